"""What a run tells whoever watches it: a display in simulation, the log elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from core.events import log, log_to_stdout, logfmt
from journal.going_on import advised, by_flower
from journal.record import RoundRecord, value_of
from server.admission import Rejection
from server.member import Member
from server.roster import Roster
from server.waiting import Sparingly, Waiting


class RunObserver(Protocol):
    """Called by the server's loop, in this order; what an observer does not care for it leaves."""

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """The folder exists, the clients answered; `done` rounds of `rounds` are behind us."""
        return

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        """These take part from now on; those came too and cannot, for their reasons."""
        return

    def roster_changed(self, roster: Roster) -> None:
        """Somebody came, changed or is left out since."""
        return

    def waiting(self, waiting: Waiting) -> None:
        """Answers are still out; called at every look, several times a second."""
        return

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """These clients are asked to train; and others, where too few of their replies count."""
        return

    def present(self, here: tuple[str, ...], gone: tuple[str, ...]) -> None:
        """Which members are connected before a round begins, and which are not."""
        return

    def phase_started(self, phase: str) -> None:
        """The server itself works: aggregating, evaluating, saving."""
        return

    def round_finished(self, record: RoundRecord, rejected: list[Rejection]) -> None:
        """A round is committed; `record` is its line in rounds.jsonl."""
        return

    def run_finished(self, folder: Path) -> None:
        """The adapter is written."""
        return

    def run_failed(self, words: str) -> None:
        """The run ended before its last round, for this reason."""
        return

    def how_to_go_on(self, folder: Path) -> str:
        """What a person does to go on with the run in this folder after it stopped."""
        return by_flower(folder)


class LogObserver(RunObserver):
    """One log line for each event."""

    def __init__(self) -> None:
        self._sparingly = Sparingly()

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """Name folder, base, clients, ranks and nodes."""
        log.info(logfmt("run", folder=folder, base=roster.base, done=done, rounds=rounds))
        for member in roster.members:
            fields = {"client": member.name, "node": member.node_id, "rank": member.rank}
            log.info(logfmt("present", **fields, examples=member.num_examples))
        self.clients_came([], roster.left_out)

    def waiting(self, waiting: Waiting) -> None:
        """For whom, since when: at once, then ever less often."""
        if self._sparingly.due(waiting):
            log.info(logfmt("waiting", phase=waiting.purpose, words=waiting))

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        """Name them, and why some cannot take part."""
        for client in joined:
            log.info(logfmt("joined", client=client))
        for client, reason in left_out.items():
            log.warning(logfmt("left-out", client=client, reason=reason))

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """Name the cohort."""
        for member in cohort:
            fields = {"client": member.name, "node": member.node_id, "rank": member.rank}
            log.info(logfmt("asked", round=server_round, **fields))

    def phase_started(self, phase: str) -> None:
        """Say what the server does."""
        log.debug(logfmt("phase", name=phase))

    def round_finished(self, record: RoundRecord, rejected: list[Rejection]) -> None:
        """Who was excluded, who counted, and the round's numbers."""
        number = record["round"]
        for rejection in rejected:
            log.warning(
                logfmt("excluded", round=number, client=rejection.client, reason=rejection.reason)
            )
        for client in record.get("clients", []):
            shown = ("client", "rank", "weight", "loss", "train_seconds", "bytes_up", "bytes_down")
            log.info(logfmt("counted", round=number, **{n: value_of(client, n) for n in shown}))
        plain = {n: v for n, v in record.items() if isinstance(v, int | float | str)}
        log.info(logfmt("round", **plain))

    def run_finished(self, folder: Path) -> None:
        """Say where the adapter is; methods with personal models export none."""
        adapter = folder / "adapter"
        log.info(logfmt("finished", adapter=adapter if adapter.is_dir() else "none"))

    def how_to_go_on(self, folder: Path) -> str:
        """By Flower: nobody watches, so no command of Bouquet's own started it."""
        return by_flower(folder)


_observer: ContextVar[RunObserver | None] = ContextVar("run observer", default=None)


@contextmanager
def observe_run(observer: RunObserver) -> Iterator[None]:
    """Every run within this context reports to `observer` instead of the log."""
    token = _observer.set(observer)
    try:
        with advised(observer.how_to_go_on):
            yield
    finally:
        _observer.reset(token)


def is_observed() -> bool:
    """Whether somebody watches, as in a simulation; in a process of Flower's nobody does."""
    return _observer.get() is not None


def current_observer() -> RunObserver:
    """Who watches this run; where nobody does, its log goes to the standard output."""
    observer = _observer.get()
    if observer is None:
        log_to_stdout()
        observer = LogObserver()
    return observer
