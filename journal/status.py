"""What a run did so far, read from its rounds.jsonl: also while it goes on.

Who took part in each round, who failed and why, how long it took and how much was sent.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from core.errors import UsageError, listing, quoted
from core.units import counted
from journal.live_status import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    LiveStatus,
    SiteStatus,
    read_live_status,
)
from journal.record import FILE, RoundRecord, read_rounds
from journal.run_folder import RunFolder, read_config
from strategies.registry import promises

Record = RoundRecord
LOOKS = 3


class NoRunError(UsageError):
    """A folder that cannot be read as a run's; a loop over the exit code ends there, too."""

    exit_code = 3


@dataclass
class SiteTotals:
    """One site over all rounds so far."""

    site: str
    rank: int | None = None
    rounds: list[int] = field(default_factory=list)
    """Those it took part in."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """(round, reason) of those it did not, though it was asked."""
    num_examples: int = 0
    train_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Status:
    """A run, as far as its folder tells."""

    folder: Path
    records: Sequence[Record]
    """Whole lines of rounds.jsonl, round 0 first."""
    wanted: int
    """Rounds that its configuration asks for."""
    strategy: str
    finished: bool
    personal: bool
    """Each client has a model of its own, so there is no global one to export."""
    idle_seconds: float
    """Since anything was written."""
    locked: bool = False
    """A process runs it."""
    live: LiveStatus | None = None
    """What its status.json tells; a run of an older version has none."""

    @property
    def done(self) -> int:
        """The newest round."""
        return int(self.records[-1]["round"]) if self.records else 0

    @property
    def own_losses(self) -> bool:
        """Whether the held-out losses of its rounds are the clients', each of its own model."""
        known = {key for record in self.records if record["round"] > 0 for key in record}
        return "held_out_loss" not in known and (self.personal or "client_held_out_loss" in known)

    def sites(self) -> list[SiteTotals]:
        """Every site that was ever asked, by name."""
        found: dict[str, SiteTotals] = {}
        for record in self.records:
            for client in record.get("clients", []):
                name = str(client["client"])
                totals = found.setdefault(name, SiteTotals(name))
                totals.rank = client["rank"]
                totals.rounds.append(int(record["round"]))
                totals.num_examples = client["num_examples"]
                totals.train_seconds += client["train_seconds"]
                totals.bytes_up += client["bytes_up"]
                totals.bytes_down += client["bytes_down"]
            failures = record.get("failures", []) + record.get("evaluation_failures", [])
            for failure in failures:
                name = str(failure["client"])
                totals = found.setdefault(name, SiteTotals(name))
                totals.failures.append((int(record["round"]), str(failure["reason"])))
        return [found[name] for name in sorted(found)]

    @property
    def state(self) -> str:
        """waiting, running, finished, failed, or stopped: its process is gone."""
        told = self.live.state if self.live else RUNNING
        if told == FAILED and not self.locked:
            return FAILED
        if self.finished:
            return FINISHED
        if not self.locked:
            return STOPPED
        return WAITING if told == WAITING else RUNNING

    @property
    def exit_code(self) -> int:
        """0 finished, 1 failed or stopped, 2 goes on or waits."""
        return {FINISHED: 0, WAITING: 2, RUNNING: 2}.get(self.state, 1)

    def sentence(self) -> str:
        """Is it alive, whom does it wait for, what failed."""
        live, state = self.live, self.state
        if state == FINISHED:
            return f"finished: round {self.done} of {self.wanted} is done"
        if state == FAILED and live:
            return f"failed after round {self.done} of {self.wanted}: {live.failure}"
        if state == STOPPED:
            return (
                f"stopped: no process runs it, and round {self.done} of {self.wanted} was the last "
                f"that it saved; it last wrote {in_words(self.idle_seconds)} ago"
            )
        if live is None:
            return f"goes on with round {self.done + 1} of {self.wanted}"
        begun = state == RUNNING
        at = f"round {live.round} of {self.wanted}, {live.phase}" if begun else live.phase
        silent = listing(live.waiting_for, limit=10)
        if live.waiting_for_more:
            more = f"{counted(live.waiting_for_more, 'site')} more"
            silent = f"{silent} and {more}" if silent else more
        if not silent or live.waiting_since is None:
            return f"alive: {at}, since {in_words(seconds_since(live.phase_since))}"
        since = in_words(seconds_since(live.waiting_since))
        late = [site.name for site in live.sites if site.state == "late"]
        tail = f"; asked again: {listing(late, limit=10)}" if late else ""
        return f"alive: {at}; waiting for {silent}, since {since}{tail}"

    def next_step(self, link: str = "LINK") -> str:
        """What an operator does now."""
        draws = f"bouquet report {self.folder} draws the run"
        if self.state == FINISHED and self.personal:
            return f"{self.strategy} has a model for each client, and no global adapter; {draws}"
        if self.state == FINISHED:
            return f"the adapter is in {self.folder}/adapter; {draws}"
        if self.exit_code == 2:
            return f"bouquet status {self.folder} --watch follows it"
        return (
            f"flwr list {link} says what became of its process; the flwr run command that started "
            "it, with resume=true, takes it up after its last round (a simulation: bouquet "
            f"simulate --resume {self.folder})"
        )

    def document(self) -> dict[str, Any]:
        """The run as `bouquet status --json` prints it: docs/status.md says what each field means.

        Of a run of an older version, which wrote no status.json, what rounds.jsonl tells.
        """
        live = self.live or LiveStatus(
            round=self.done, rounds=self.wanted, sites=[_as_live(site) for site in self.sites()]
        )
        told = asdict(live) | {"state": self.state, "rounds_done": self.done, "rounds": self.wanted}
        return {"run": str(self.folder), "strategy": self.strategy, "says": self.sentence(), **told}


def _as_live(site: SiteTotals) -> SiteStatus:
    round_, words = site.failures[-1] if site.failures else (None, None)
    return SiteStatus(
        site.site,
        rank=site.rank,
        examples=site.num_examples or None,
        bytes_up=site.bytes_up,
        bytes_down=site.bytes_down,
        failures=len(site.failures),
        words=None if words is None else quoted(words),
        failed_round=round_,
    )


def read_status(folder: Path) -> Status:
    """Read a run's folder; NoRunError where it is none, UsageError where it is damaged."""
    if not (folder / "config.toml").is_file():
        raise NoRunError(
            f"{folder} is no folder of a run: it has no config.toml. A deployed run lies below the "
            "SuperLink's folder: coordinator/runs/NAME"
        )
    run = RunFolder(folder)
    for _ in range(LOOKS):  # a run that begins or ends meanwhile: what was read is of neither
        locked = run.is_locked()
        status = _read(folder, locked)
        if run.is_locked() == locked:
            break
    return status


def _is_personal(strategy: str) -> bool:
    promised = promises(strategy)
    return promised is not None and promised.personal


def _read(folder: Path, locked: bool) -> Status:
    config = read_config(folder / "config.toml")
    records = read_rounds(folder / FILE)
    live, strategy = read_live_status(folder), str(config["strategy.name"])
    wanted = live.rounds if live else int(config["rounds"])  # of a take-up that still waits: more
    personal = _is_personal(strategy)  # has no global model to export
    done = int(records[-1]["round"]) if records else 0
    exported = personal or (folder / "adapter").is_dir()  # perhaps by the run before a take-up
    ended = live is None or live.state == FINISHED
    return Status(
        folder=folder,
        records=records,
        wanted=wanted,
        strategy=strategy,
        finished=ended and exported and bool(records) and done >= wanted,
        personal=personal,
        idle_seconds=max(0.0, time.time() - _last_written(folder)),
        locked=locked,
        live=live,
    )


def _last_written(folder: Path) -> float:
    """When any file in it was; a run that goes on replaces some while we look."""
    moments = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            moments.append(path.stat().st_mtime)
    return max(moments)


def seconds_since(moment: str) -> float:
    """How long ago this time of a status document was; 0.0 for one that it does not tell."""
    if not moment:
        return 0.0
    return max(0.0, time.time() - datetime.fromisoformat(moment).timestamp())


def in_words(seconds: float) -> str:
    """A duration as a person says it.

    >>> in_words(40), in_words(600), in_words(36_000)
    ('40 s', '10 min', '10 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
