"""What a run tells whoever watches it: a display in simulation, the log elsewhere."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from server.exchange import Rejection
from server.roster import Member, Roster

log = logging.getLogger("bouquet")


class RunObserver(Protocol):
    """Called by the server's loop, in this order."""

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """The folder exists, the clients answered; `done` rounds of `rounds` are behind us."""

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """These clients are asked to train."""

    def phase_started(self, phase: str) -> None:
        """The server itself works: aggregating, evaluating, saving."""

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """A round is committed; `record` is its line in rounds.jsonl."""

    def run_finished(self, folder: Path) -> None:
        """The adapter is written."""


class LogObserver:
    """One log line for each event."""

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """Name folder, clients and ranks."""
        ranks = ", ".join(f"{name} (rank {rank})" for name, rank in roster.ranks.items())
        log.info("run %s: round %d of %d is next; clients: %s", folder, done + 1, rounds, ranks)
        for client, reason in roster.left_out.items():
            log.warning("%s is left out: %s", client, reason)

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """Name the cohort."""
        log.info("round %d: %s", server_round, ", ".join(member.name for member in cohort))

    def phase_started(self, phase: str) -> None:
        """Say what the server does."""
        log.debug("%s", phase)

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """Losses, noise, bytes and who was excluded."""
        for rejection in rejected:
            log.warning(
                "round %d excludes %s: %s", record["round"], rejection.client, rejection.reason
            )
        shown = {name: value for name, value in record.items() if isinstance(value, int | float)}
        log.info("%s", ", ".join(f"{name} {value:.6g}" for name, value in shown.items()))

    def run_finished(self, folder: Path) -> None:
        """Say where the adapter is."""
        log.info("the adapter is in %s", folder / "adapter")


_observer: ContextVar[RunObserver | None] = ContextVar("run observer", default=None)


@contextmanager
def observe_run(observer: RunObserver) -> Iterator[None]:
    """Every run within this context reports to `observer` instead of the log."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def current_observer() -> RunObserver:
    """Who watches this run."""
    return _observer.get() or LogObserver()
