"""The loop over rounds.

    ask who is there -> for each round: sample, send, train, admit, aggregate, evaluate, log, save

The loop is the server's own because Flower's `Strategy.start` cannot resume. What a round depends
on is the ServerState alone (and the configuration), so a resumed run gives the same bytes as one
that was never interrupted.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import MessageType
from flwr.serverapp import Grid

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import balanced_at, beyond
from adapters.errors import BouquetError, UsageError, listing
from adapters.head import mean_of_heads
from server.broadcast import Asked, ask, broadcast_to, round_messages, start_seed
from server.evaluation import evaluate_on_clients, evaluate_on_server, evaluate_trained
from server.exchange import Rejection, Reply, admit_replies
from server.method import method_of
from server.progress import RunObserver, current_observer
from server.roster import Roster, ask_principal, call_roster
from server.run_folder import RunFolder, open_run_folder
from server.sampling import sample_cohort
from server.state import ServerState
from server.telemetry import base_record, round_record
from settings.run import RunSettings
from strategies.registry import refuse_ranks
from strategies.strategy import GlobalModel, Strategy, Update


def run_rounds(grid: Grid, settings: RunSettings) -> Path:
    """Run, or with settings.resume go on with, a federation; returns the run's folder."""
    observer = current_observer()
    strategy = method_of(settings)
    roster = call_roster(grid, settings.clients.min_replies, settings.clients.timeout_seconds)
    refuse_ranks(settings.strategy.name, strategy, roster.ranks)
    folder, state = open_run_folder(settings)
    if state is not None:
        _check_same_base(state, roster)
    done = state.round if state is not None else 0
    observer.run_opened(folder.path, roster, done, settings.rounds)
    if state is None:
        state = _begin(settings, strategy, roster, grid, folder, observer)
    while state.round < settings.rounds:
        state = _play_round(settings, strategy, roster, grid, folder, observer, state)
    total = state.model.total()
    if total is not None and not strategy.properties.personal:
        observer.phase_started("writing the adapter")
        folder.export(total, settings.model.path, state.model.head, settings.data.listed_labels())
    observer.run_finished(folder.path)
    return folder.path


def _check_same_base(state: ServerState, roster: Roster) -> None:
    if state.base != roster.base or dict(state.shapes) != dict(roster.shapes):
        raise UsageError(
            f"the run was begun on base model {state.base}, but the clients now have "
            f"{roster.base}: a resumed run needs the same base and target modules"
        )


def _begin(
    settings: RunSettings,
    strategy: Strategy,
    roster: Roster,
    grid: Grid,
    folder: RunFolder,
    observer: RunObserver,
) -> ServerState:
    """Round 0: the base model's loss, and the state that round 1 begins from."""
    model = begin_model(settings, strategy, roster, grid)
    began = time.perf_counter()
    held_out, _ = _evaluate(settings, grid, strategy, model, 0, roster, observer)
    record = base_record(held_out) | {"evaluate_seconds": time.perf_counter() - began}
    state = ServerState(
        0, model, roster.base, roster.shapes, folder.append(record), roster.head_shapes
    )
    folder.save(state)
    observer.round_finished(record, [])
    return state


def begin_model(
    settings: RunSettings, strategy: Strategy, roster: Roster, grid: Grid
) -> GlobalModel:
    """What the clients receive in round 1: drawn at the largest rank, from the run's seed."""
    rank = max(roster.ranks.values())
    scale = settings.lora.scale_of(rank)
    if strategy.properties.begins_from_base:
        found = ask_principal(grid, roster, rank, settings.clients.timeout_seconds)
        return strategy.begin(balanced_at(found, scale))
    return strategy.begin(draw(roster.shapes, rank, start_seed(settings), scale))


def _play_round(
    settings: RunSettings,
    strategy: Strategy,
    roster: Roster,
    grid: Grid,
    folder: RunFolder,
    observer: RunObserver,
    state: ServerState,
) -> ServerState:
    """One round, committed."""
    server_round = state.round + 1
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    cohort = sample_cohort(roster.members, settings.clients.fraction, settings.seed, server_round)
    observer.round_started(server_round, cohort)
    asked = ask(cohort, strategy, state.model)
    with _timed(seconds, "train_seconds"):
        sent = broadcast_to(asked, state.model, settings.wire.dtype)
        messages = round_messages(
            MessageType.TRAIN, asked, sent, settings, server_round, roster.base
        )
        answers = grid.send_and_receive(messages, timeout=settings.clients.timeout_seconds)
        replies, rejected = admit_replies(
            answers, asked, state.model.start, roster, settings, server_round
        )
    _check_enough(replies, rejected, settings, server_round)
    observer.phase_started("aggregating")
    updates = weigh(replies, settings.clients.weights)
    freezes_tail = freezes_tails(asked)
    tails = frozen_tails(replies, updates, state.model.start) if freezes_tail else []
    with _timed(seconds, "aggregate_seconds"):
        model = aggregate(strategy, state.model, replies, updates, tails)
    with _timed(seconds, "telemetry_seconds"):
        record = round_record(
            server_round, state.model, model, sent, replies, updates, tails, rejected, freezes_tail
        )
    if server_round % settings.evaluate.every == 0 or server_round == settings.rounds:
        with _timed(seconds, "evaluate_seconds"):
            if settings.evaluate.trained and not strategy.properties.personal:
                observer.phase_started("evaluating what came back")
                record |= evaluate_trained(state.model, replies, updates, freezes_tail, settings)
            held_out, unheard = _evaluate(
                settings, grid, strategy, model, server_round, roster, observer
            )
            record |= held_out
            rejected += unheard
    record |= seconds | {"seconds": time.perf_counter() - began}
    observer.phase_started("saving")
    state = replace(state, round=server_round, model=model, log_bytes=folder.append(record))
    folder.save(state)
    observer.round_finished(record, rejected)
    return state


def weigh(replies: list[Reply], rule: str) -> list[Update]:
    """Updates with weights p_k that sum to 1: n_k / sum n, or 1 / K under `uniform`."""
    shares = [reply.num_examples if rule == "examples" else 1 for reply in replies]
    return [
        Update(reply.member.name, share / sum(shares), reply.adapter)
        for reply, share in zip(replies, shares, strict=True)
    ]


def freezes_tails(asked: Sequence[Asked]) -> bool:
    """Whether this cohort keeps what lies beyond each client's rank; it does so as one."""
    return any(each.rule.freezes_tail for each in asked)


def frozen_tails(
    replies: list[Reply], updates: list[Update], start: Adapter | None
) -> list[Update]:
    """What the clients kept frozen of `start`, all together: sum_k p_k beyond(start, r_k).

    One more update, of weight 1, or none where nobody froze anything. Direction j of the start is
    in it with the weights of those clients whose rank is at most j.
    """
    ranks = [reply.adapter.rank for reply in replies]
    if start is None or start.rank <= min(ranks):
        return []
    modules = {}
    for name, f in beyond(start, min(ranks)).items():
        places = np.arange(min(ranks), min(ranks) + f.rank)
        kept = sum(
            update.weight * (places >= rank) for update, rank in zip(updates, ranks, strict=True)
        )
        modules[name] = Factors(f.a, f.b * np.asarray(kept, np.float32), f.scale)
    return [Update("frozen", 1.0, Adapter(modules))]


def aggregate(
    strategy: Strategy,
    model: GlobalModel,
    replies: list[Reply],
    updates: list[Update],
    tails: list[Update],
) -> GlobalModel:
    """The strategy's next model, with the mean of the heads where the task has one."""
    after = strategy.aggregate(model, [*updates, *tails])
    heads = [reply.head for reply in replies if reply.head is not None]
    if not heads:
        return after
    return replace(after, head=mean_of_heads(heads, [update.weight for update in updates]))


def _check_enough(
    replies: list[Reply], rejected: list[Rejection], settings: RunSettings, server_round: int
) -> None:
    if len(replies) < settings.clients.min_replies:
        reasons = listing([f"{r.client}: {r.reason}" for r in rejected], limit=3)
        raise BouquetError(
            f"round {server_round} has {len(replies)} usable replies and needs "
            f"{settings.clients.min_replies} (clients.min-replies). {reasons}"
        )


def _evaluate(
    settings: RunSettings,
    grid: Grid,
    strategy: Strategy,
    model: GlobalModel,
    server_round: int,
    roster: Roster,
    observer: RunObserver,
) -> tuple[dict[str, Any], list[Rejection]]:
    held_out: dict[str, Any] = {}
    rejected: list[Rejection] = []
    if settings.evaluate.server and (server_round == 0 or not strategy.properties.personal):
        observer.phase_started("evaluating")
        held_out |= evaluate_on_server(model, settings)
    if settings.evaluate.clients or strategy.properties.personal:
        observer.phase_started("clients evaluate")
        asked = ask(roster.members, strategy, model)
        found, rejected = evaluate_on_clients(grid, model, settings, server_round, asked, roster)
        held_out |= found
    return held_out, rejected


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
