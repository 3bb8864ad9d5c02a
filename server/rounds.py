"""The loop over rounds.

    ask who is there -> for each round: sample, send, train, admit, aggregate, evaluate, log, save

The loop is the server's own because Flower's `Strategy.start` cannot resume. What a round depends
on is the ServerState and who takes part (and the configuration), so a resumed run gives the same
bytes as one that was never interrupted.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from adapters.adapter import draw
from adapters.algebra import balanced_at
from adapters.peft_files import PeftAdapter
from core.errors import BouquetError, ReplyError, listing
from journal.record import RoundRecord
from journal.run_folder import RunFolder, open_run_folder, refuse_other_data
from journal.state import ServerState
from server.admission import Admitted, Rejection, admit_replies, reply_bytes
from server.alarms import Alarms
from server.attendance import Attendance, ask_principal, call_roster
from server.broadcast import Asked, Broadcast, ask, broadcast_to, received_start, round_messages
from server.combining import combine
from server.data_record import evaluated_record
from server.evaluation import evaluate_on_clients, evaluate_on_server, evaluate_trained, with_labels
from server.guard import guard
from server.mailbox import Look, Mailbox
from server.member import Member
from server.method import has_own_models, method_of, rules_of
from server.pieces import gained_at_first, in_pieces
from server.progress import RunObserver, current_observer
from server.roster import Kind, Roster, Rules
from server.sampling import cohort_size, sample_cohort
from server.start_adapter import keep_start_adapter, read_start_adapter, with_adapter
from server.status_file import StatusFile
from server.telemetry import base_record, failures_of, round_record
from server.waiting import COMING_BACK, Waiting
from settings.run import RunSettings
from settings.seeds import derive_seed, start_seed
from strategies.strategy import Aggregated, GlobalModel, Strategy
from wire.codec import as_sent
from wire.messages import holdings_in

WAIT_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Run:
    """What every round of a run needs, besides the state."""

    settings: RunSettings
    strategy: Strategy
    mailbox: Mailbox
    attendance: Attendance
    folder: RunFolder
    observer: RunObserver


def run_rounds(grid: Grid, settings: RunSettings) -> Path:
    """Run, or with settings.resume go on with, a federation; returns the run's folder.

    The folder is opened first: a changed key, or a lock that another holds, is told before any
    site is asked.
    """
    asked_for = settings
    with ExitStack() as opened:
        with _failures_told(Alarms(settings.status, Path(settings.output)).refused):
            settings = with_labels(settings)
            strategy, mailbox = method_of(settings), Mailbox(grid)
            evaluated = evaluated_record(settings)
            refuse_other_data(settings, evaluated)
            folder, state = opened.enter_context(open_run_folder(settings, evaluated))
            observer = StatusFile(
                current_observer(),
                folder.path,
                settings.rounds,
                settings.clients.min_replies,
                Alarms(settings.status, folder.path),
            )
        with _failures_told(observer.run_failed):
            rules = rules_of(settings, strategy)
            roster = call_roster(
                mailbox,
                settings.clients.min_replies,
                settings.clients.timeout_seconds,
                _agreed(state, rules) if state else None,
                state.data if state else None,
                observer.waiting,
                rules,
            )
            settings = with_labels(asked_for, roster.labels)
            folder.check_same(settings)
            folder.keep_config(settings)
            attendance = Attendance(mailbox, roster, rules)
            run = Run(settings, strategy, mailbox, attendance, folder, observer)
            _play(run, state)
    return folder.path


def _play(run: Run, state: ServerState | None) -> None:
    """What is left of the run, and its adapter."""
    settings, folder, roster = run.settings, run.folder, run.attendance.roster
    adapter = None if state else read_start_adapter(settings, roster.shapes, roster.head_shapes)
    run.observer.run_opened(folder.path, roster, state.round if state else 0, settings.rounds)
    if state is None:
        state = _begin(run, adapter)
    while state.round < settings.rounds:
        state = _play_round(run, state)
    total = state.model.total()
    if total is not None and not run.strategy.properties.personal:
        run.observer.phase_started("writing the adapter")
        folder.export(total, settings.model.path, state.model.head, settings.data.listed_labels())
    run.observer.run_finished(folder.path)


@contextmanager
def _failures_told(tell: Callable[[str], None]) -> Iterator[None]:
    """Whoever watches is told why a run ends before its last round."""
    try:
        yield
    except BaseException as error:
        words = (
            str(error) if isinstance(error, BouquetError) else f"{type(error).__name__}: {error}"
        )
        tell("interrupted" if isinstance(error, KeyboardInterrupt) else words)
        raise


def _agreed(state: ServerState, rules: Rules) -> Kind:
    """What the members of a run that goes on have agreed in."""
    start = state.model.start
    return Kind(
        state.base,
        tuple(sorted((name, m, n) for name, (m, n) in state.shapes.items())),
        tuple(sorted(state.head_shapes.items())),
        state.labels,
        state.template,
        start.rank if rules.one_rank and start is not None else None,
    )


def _begin(run: Run, adapter: PeftAdapter | None) -> ServerState:
    """Round 0: the loss of the base, with the adapter if any, and what round 1 begins from."""
    keep_start_adapter(run.settings, run.folder.path)
    roster = run.attendance.roster
    look = _telling(run, "decomposing the base", roster.members)
    begun = begin_model(run.settings, run.strategy, roster, run.mailbox, look)
    model = with_adapter(begun, adapter)
    state = ServerState(
        0,
        model,
        roster.base,
        roster.shapes,
        0,
        roster.head_shapes,
        data=roster.data,
        labels=roster.labels,
        template=roster.template,
    )
    added = [] if adapter is None else [adapter.adapter]
    gained = gained_at_first(run.strategy, begun, added)
    pieces, merged = in_pieces((), GlobalModel(), model, run.settings.wire.dtype, gained)
    state = replace(state, model=replace(model, merged=merged), pieces=pieces)
    began = time.perf_counter()
    held_out, unheard = _evaluate(run, state, roster.members)
    record = base_record(held_out, roster)
    record["evaluation_failures"] = failures_of(unheard)
    record["evaluate_seconds"] = time.perf_counter() - began
    state = replace(state, log_bytes=run.folder.append(record))
    run.folder.save(state)
    run.observer.round_finished(record, unheard)
    return state


def begin_model(
    settings: RunSettings,
    strategy: Strategy,
    roster: Roster,
    mailbox: Mailbox,
    look: Callable[[Look], None] = lambda look: None,
) -> GlobalModel:
    """What the clients receive in round 1: drawn at the largest rank, from the run's seed."""
    rank = max(roster.ranks.values())
    scale = settings.lora.scale_of(rank)
    if strategy.properties.begins_from_base:
        found = ask_principal(mailbox, roster, rank, settings.clients.timeout_seconds, look)
        # Rounded once, here, so that what clients receive of it each round is exactly this.
        return strategy.begin(as_sent(balanced_at(found, scale), settings.wire.dtype))
    return strategy.begin(draw(roster.shapes, rank, start_seed(settings), scale))


def _play_round(run: Run, state: ServerState) -> ServerState:
    """One round, committed."""
    settings, strategy, server_round = run.settings, run.strategy, state.round + 1
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    present = _wait_for_members(run)
    with _timed(seconds, "train_seconds"):
        asked, sent, admitted = _train(run, state, present)
    rejected = list(admitted.rejected)
    run.observer.phase_started("aggregating")
    with _timed(seconds, "aggregate_seconds"):
        weights, replies = settings.clients.weights, admitted.replies
        combined = combine(
            strategy,
            state.model,
            replies,
            asked,
            sent,
            weights,
            len(run.attendance.roster.members),
        )
        after = _after(state, combined.aggregated, settings)
    with _timed(seconds, "telemetry_seconds"):
        record = round_record(
            server_round,
            combined,
            after.model,
            asked,
            sent,
            rejected,
            derive_seed(settings.seed, server_round, "compared"),
        )
    if server_round % settings.evaluate.every == 0 or server_round == settings.rounds:
        with _timed(seconds, "evaluate_seconds"):
            if settings.evaluate.trained and not strategy.properties.personal:
                run.observer.phase_started("evaluating what came back")
                record |= evaluate_trained(combined, settings)
            busy = {*admitted.spare, *(rejection.client for rejection in rejected)}
            held_out, unheard = _evaluate(run, after, [m for m in present if m.name not in busy])
            record |= held_out
            record["evaluation_failures"] = failures_of(unheard)
            rejected += unheard
    record |= {"spare": admitted.spare, "strays": dict(run.mailbox.strays)}
    record |= cast(RoundRecord, seconds | {"seconds": time.perf_counter() - began})
    run.observer.phase_started("saving")
    data = run.attendance.roster.data
    after = replace(after, log_bytes=run.folder.append(record), data=data)
    run.folder.save(after)
    run.observer.round_finished(record, rejected)
    failed = {rejection.client for rejection in rejected}
    run.attendance.ask_again([member for member in present if member.name in failed])
    return after


def _train(
    run: Run, state: ServerState, present: list[Member]
) -> tuple[list[Asked], Broadcast, Admitted]:
    """Sample, send, and take what comes in time: who was asked what, and what of it counts.

    Where too few replies are usable, as many others are asked instead, with a deadline of their
    own, until nobody is left.
    """
    settings, clients, server_round = run.settings, run.settings.clients, state.round + 1
    cohort = sample_cohort(
        present, clients.fraction, settings.seed, server_round, clients.over_selection
    )
    enough = cohort_size(len(present), clients.fraction)
    run.observer.round_started(server_round, cohort)
    began, asked, came = time.monotonic(), [], Admitted([], [], [])
    while True:
        wave = ask(cohort, run.strategy, state.model, clients.head)
        asked += wave
        sent = broadcast_to(asked, state.model, settings.wire.dtype, state.pieces)
        came = came.with_more(_train_wave(run, state, wave, sent, enough))
        admitted = guard(came, asked, received_start(state.model, sent), clients)
        enough = clients.min_replies - len(admitted.replies)
        if enough <= 0:
            return asked, sent, admitted
        cohort = _others(run, [each.member for each in asked], enough, server_round, began)
        if not cohort:
            raise _too_few(admitted, clients.min_replies, server_round)


def _train_wave(
    run: Run, state: ServerState, asked: list[Asked], sent: Broadcast, enough: int
) -> Admitted:
    """Ask these clients to train, and take what comes in time until so many are usable."""
    settings, server_round = run.settings, state.round + 1
    messages = round_messages(MessageType.TRAIN, asked, sent, settings, server_round, state.base)
    room = reply_bytes(asked, run.attendance.roster, settings.wire.dtype)
    look = _telling(run, "training", [each.member for each in asked])
    answers = run.mailbox.exchange(messages, settings.clients.timeout_seconds, room, look)
    admitted = admit_replies(
        _noting_holdings(run, answers),
        asked,
        state.model.start,
        run.attendance.roster,
        settings,
        server_round,
        enough=enough,
    )
    for _ in _noting_holdings(run, run.mailbox.unheard):
        pass
    return admitted


def _others(
    run: Run, asked: Sequence[Member], needed: int, server_round: int, began: float
) -> list[Member]:
    """So many members that were not asked yet, or as many as there are; nobody if all were.

    Where too few are connected, it waits for the others, until clients.timeout-seconds after the
    round began.
    """
    timeout = run.settings.clients.timeout_seconds
    failed = {member.name for member in asked}
    while True:
        here = [member for member in run.attendance.update() if member.name not in failed]
        known = [member for member in run.attendance.roster.members if member.name not in failed]
        gone = tuple(member.name for member in known if member not in here)
        waited = time.monotonic() - began
        if here and (len(here) >= needed or not gone or waited > timeout):
            share = min(1.0, needed / len(here))
            others = sample_cohort(here, share, run.settings.seed, server_round)
            run.observer.round_started(server_round, others)
            return others
        if not gone or waited > timeout or run.mailbox.is_closed:
            return here
        names = tuple(member.name for member in here)
        run.observer.waiting(Waiting(COMING_BACK, names, gone, 0, waited, timeout - waited))
        time.sleep(WAIT_SECONDS)


def _after(state: ServerState, made: Aggregated, settings: RunSettings) -> ServerState:
    """The state after a round that made this, with merged as the sum of its pieces."""
    pieces, merged = in_pieces(
        state.pieces or (), state.model, made.model, settings.wire.dtype, made.gained
    )
    model = replace(made.model, merged=merged)
    return replace(state, round=state.round + 1, model=model, pieces=pieces)


def _wait_for_members(run: Run) -> list[Member]:
    """The members that are connected; waits until there are clients.min-replies, or a deadline."""
    clients, began = run.settings.clients, time.monotonic()
    before = run.attendance.roster
    while True:
        present = run.attendance.update()
        waited = time.monotonic() - began
        here = tuple(member.name for member in present)
        gone = tuple(m.name for m in run.attendance.roster.members if m.name not in here)
        run.observer.present(here, gone)
        if len(present) >= clients.min_replies or waited > clients.timeout_seconds:
            break
        more, left = clients.min_replies - len(here) - len(gone), clients.timeout_seconds - waited
        run.observer.waiting(Waiting(COMING_BACK, here, gone, max(0, more), waited, left))
        time.sleep(WAIT_SECONDS)
    roster = run.attendance.roster
    if roster is not before:
        run.observer.roster_changed(roster)
    joined = [name for name in roster.ranks if name not in before.ranks]
    left_out = {n: why for n, why in roster.left_out.items() if n not in before.left_out}
    if joined or left_out:
        run.observer.clients_came(joined, left_out)
    if not present:
        raise BouquetError(
            f"no client is connected any more, after {run.settings.clients.timeout_seconds:g} s of "
            "waiting; the run is saved up to its last round: start it again when they are back"
        )
    return present


def _telling(run: Run, purpose: str, members: Sequence[Member]) -> Callable[[Look], None]:
    """Tells whoever watches of a wait for these members, by their names."""
    names = {member.node_id: member.name for member in members}

    def tell(look: Look) -> None:
        heard, silent, again = (
            tuple(name for node, name in names.items() if node in nodes)
            for nodes in (look.heard, look.silent, look.again)
        )
        run.observer.waiting(Waiting(purpose, heard, silent, 0, look.seconds, look.left, again))

    return tell


def _noting_holdings(run: Run, answers: Iterable[Message]) -> Iterator[Message]:
    """The answers; what each client says that it holds goes to the roster, where it can be read."""
    for answer in answers:
        if answer.has_content():
            with suppress(ReplyError):  # whoever reads the answer itself says so
                if (pieces := holdings_in(answer.content)) is not None:
                    run.attendance.note_holdings(answer.metadata.src_node_id, pieces)
        yield answer


def _too_few(admitted: Admitted, needed: int, server_round: int) -> BouquetError:
    reasons = listing([f"{r.client}: {r.reason}" for r in admitted.rejected], limit=3)
    return BouquetError(
        f"round {server_round} has {len(admitted.replies)} usable replies and needs "
        f"{needed} (clients.min-replies). {reasons}"
    )


def _evaluate(
    run: Run, state: ServerState, members: list[Member]
) -> tuple[RoundRecord, list[Rejection]]:
    """The global model's losses, on the server and on these clients, as the settings ask.

    Where clients have models of their own, the server evaluates the base alone, and they evaluate
    in any case.
    """
    settings, strategy, model = run.settings, run.strategy, state.model
    held_out: RoundRecord = {}
    rejected: list[Rejection] = []
    own = has_own_models(settings, strategy)
    if settings.evaluate.server and (state.round == 0 or not own):
        run.observer.phase_started("evaluating")
        held_out |= evaluate_on_server(model, settings)
    if settings.evaluate.clients or own:
        run.observer.phase_started("clients evaluate")
        present = [run.attendance.current(member) for member in members]
        asked = ask(present, strategy, model, settings.clients.head)
        sent = broadcast_to(asked, model, settings.wire.dtype, state.pieces)
        messages = round_messages(
            MessageType.EVALUATE, asked, sent, settings, state.round, state.base
        )
        answers = run.mailbox.exchange(
            messages,
            settings.clients.timeout_seconds,
            look=_telling(run, "clients evaluate", present),
        )
        found, rejected = evaluate_on_clients(
            list(_noting_holdings(run, answers)), asked, state.round, state.base
        )
        bytes_down = sum(sent.bytes_for(each.member) for each in asked)
        held_out |= found
        held_out["evaluate_bytes_down"] = bytes_down
    return held_out, rejected


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began
