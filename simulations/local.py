"""The reference that a client has without federation: its own data alone.

Every client trains its own adapter, of its own rank, for as many rounds as the federation has and
with the same steps, schedule and seeds in each, going on from its own factors with a fresh
optimizer. Nothing is merged and nothing travels. It plays every round, also where the federation
samples only some clients.
"""

import statistics
from collections.abc import Callable
from typing import Any, cast

from adapters.adapter import Adapter, draw
from client.training import Trained, train
from journal.record import ClientRecord, EvaluationRecord, RoundRecord
from settings.seeds import derive_seed
from settings.site import client_name
from simulations.references import Bench, client_metrics


def train_alone(bench: Bench, number: int) -> list[Trained]:
    """What one client has after each round of training on its own."""
    settings, name = bench.settings, client_name(number)
    rank = settings.lora.rank_of(number)
    examples = bench.encode(bench.federation.parts[number].train)
    bench.tuned.merge(bench.merged)
    head = bench.head
    adapter: Adapter | None = None
    rounds: list[Trained] = []
    for local_round in range(1, settings.rounds + 1):
        seed = derive_seed(settings.seed, local_round, name)
        if adapter is None:
            adapter = draw(bench.tuned.shapes, rank, seed, settings.lora.scale_of(rank))
        trained = train(
            bench.tuned,
            examples,
            adapter,
            settings.local,
            seed,
            dropout=settings.lora.dropout,
            head=head,
        )
        adapter, head = trained.adapter, trained.head
        rounds.append(trained)
    return rounds


def play_local(bench: Bench, on_phase: Callable[[str], None]) -> RoundRecord:
    """The record of the last round: every client alone, and the mean over clients.

    held_out_loss is the mean over clients, each counting once, of the loss on the global part;
    client_held_out is each client's own model on its own part.
    """
    clients: list[ClientRecord] = []
    own: list[EvaluationRecord] = []
    for number, part in enumerate(bench.federation.parts):
        name = client_name(number)
        on_phase(f"{name} alone, {number + 1} of {bench.settings.clients.count}")
        rounds = train_alone(bench, number)
        model = rounds[-1]
        own.append(bench.evaluate_client(number, model))
        clients.append(
            {
                "client": name,
                "rank": model.adapter.rank,
                "num_examples": len(bench.encode(part.train)),
                "loss": model.loss,
                "tokens": sum(trained.tokens for trained in rounds),
                "steps": sum(trained.steps for trained in rounds),
                "examples_seen": sum(trained.examples for trained in rounds),
                "train_seconds": sum(trained.seconds for trained in rounds),
                "bytes_up": 0,
                "bytes_down": 0,
                **cast(ClientRecord, bench.evaluate_globally(model)),
            }
        )
    globally = [name for name in clients[0] if name.startswith("held_out_")]
    weights = [client["tokens"] for client in clients]
    record: RoundRecord = {
        "train_loss": statistics.fmean([client["loss"] or 0.0 for client in clients], weights),
        "train_tokens": sum(weights),
        "clients": clients,
    }
    means = {
        name: statistics.fmean(cast(Any, client)[name] for client in clients) for name in globally
    }
    return {**record, **cast(RoundRecord, means), **client_metrics(own)}
