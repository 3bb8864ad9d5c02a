"""The reference that federation gives up: one LoRA on everyone's data in one place.

It trains on the union of the clients' training parts, with the largest client's rank, for as many
optimizer steps as all clients took together over all rounds: the same number of examples seen, in
one run of one schedule. Its held-out loss is that of the same held-out part.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.adapter import draw
from client.training import Trained, plan_steps, train
from core.events import log, logfmt
from journal.record import RoundRecord
from journal.run_folder import RunFolder
from server.sampling import sample_cohort
from settings.run import RunSettings
from settings.seeds import derive_seed
from simulations.references import Bench, open_bench

FILE = "central.json"


def train_pooled(bench: Bench, steps: int) -> Trained:
    """Train for `steps` optimizer steps on the pooled data, over what the run begins from."""
    settings, tuned = bench.settings, bench.tuned
    examples = [example for part in bench.federation.parts for example in bench.encode(part.train)]
    rank = max(settings.ranks())
    seed = derive_seed(settings.seed, "central")
    once = plan_steps(len(examples), replace(settings.local, epochs=1, max_steps=0))
    local = replace(settings.local, epochs=math.ceil(steps / once), max_steps=steps)
    start = draw(tuned.shapes, rank, seed, settings.lora.scale_of(rank))
    tuned.merge(bench.merged)
    return train(
        tuned, examples, start, local, seed, dropout=settings.lora.dropout, head=bench.head
    )


def planned_steps(bench: Bench) -> int:
    """The optimizer steps that all clients of the federation take together over all rounds."""
    settings = bench.settings
    parts = bench.federation.parts
    steps = [plan_steps(len(bench.encode(part.train)), settings.local) for part in parts]
    return sum(
        steps[number]
        for server_round in range(1, settings.rounds + 1)
        for number in sample_cohort(
            range(len(parts)), settings.clients.fraction, settings.seed, server_round
        )
    )


def play_central(bench: Bench, on_phase: Callable[[str], None]) -> RoundRecord:
    """The record of the last round: one adapter from everyone's data."""
    steps = planned_steps(bench)
    on_phase(f"one adapter on the pooled data, {steps} steps")
    trained = train_pooled(bench, steps)
    record: RoundRecord = {
        "train_loss": trained.loss,
        "train_tokens": trained.tokens,
        "train_steps": trained.steps,
        "examples_seen": trained.examples,
        "train_seconds": trained.seconds,
        "global_rank": trained.adapter.rank,
        **bench.evaluate_globally(trained),
    }
    if bench.settings.evaluate.clients:
        record |= bench.evaluate_clients(trained)
    return record


def central_reference(
    settings: RunSettings, rounds: Sequence[RoundRecord], folder: Path
) -> dict[str, Any]:
    """The reference for this run, from central.json where it was already computed."""
    steps = sum(client["steps"] for record in rounds[1:] for client in record["clients"])
    kept = _kept(folder / FILE)
    if kept.get("steps") == steps:
        return kept
    evaluate = replace(settings.evaluate, server=True)
    bench = open_bench(replace(settings, output=str(folder), evaluate=evaluate))
    trained = train_pooled(bench, steps)
    result = {
        "rank": max(settings.ranks()),
        "steps": trained.steps,
        "examples_seen": trained.examples,
        "tokens": trained.tokens,
        "train_loss": trained.loss,
        **bench.evaluate_globally(trained),
        "train_seconds": trained.seconds,
    }
    if "client_held_out" in rounds[-1]:
        result |= bench.evaluate_clients(trained)
    RunFolder(folder).write(FILE, (json.dumps(result, indent=1) + "\n").encode())
    return result


def _kept(path: Path) -> dict[str, Any]:
    """What was computed before; {}, and a word in the log, where the file is damaged."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_bytes())
        if isinstance(kept, dict):
            return kept
        reason = "it holds no object"
    except (OSError, ValueError) as error:
        reason = str(error)
    log.warning(logfmt("computed-again", file=path, reason=reason))
    return {}
