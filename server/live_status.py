"""status.json in the run's folder: how the run stands now, for people and programs that watch.

Written by the server at each event and while it waits, whole or not at all; docs/status.md says
what each field means. rounds.jsonl remains the record of what is committed: this file is only the
present, and a run goes on without it.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapters.errors import UsageError, quoted
from server.exchange import Rejection
from server.member import Member
from server.progress import RunObserver
from server.roster import Roster
from server.run_folder import read_records
from server.waiting import COMING_BACK, INTRODUCTIONS, Waiting
from settings.events import log, logfmt

FORMAT = "bouquet-status-1"
NAME = "status.json"
WRITE_EVERY_SECONDS = 5.0
ROUNDS_IN_MEAN = 5
WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"


@dataclass
class SiteStatus:
    """One site, as the server last heard of it."""

    name: str
    node: int = 0
    rank: int | None = None
    examples: int | None = None
    state: str = "here"
    """absent, here, asked, answered, late, failed, left out."""
    asked_at: str | None = None
    answered_at: str | None = None
    late_since: str | None = None
    last_seen: str | None = None
    bytes_up: int = 0
    """Of all rounds so far."""
    bytes_down: int = 0
    seconds: float | None = None
    """Of its last training."""
    change: float | None = None
    """Norm of what it changed in its last round."""
    loss: float | None = None
    failures: int = 0
    words: str | None = None
    """Why it failed last, in its own words."""
    failed_round: int | None = None

    def answered(self, now: str) -> None:
        """It is heard of; it is late no more."""
        self.state, self.late_since = "answered", None
        self.answered_at = self.last_seen = now


@dataclass
class LiveStatus:
    """A run at one moment; times are ISO 8601 in UTC."""

    format: str = FORMAT
    state: str = WAITING
    phase: str = "starting"
    phase_since: str = ""
    started: str = ""
    updated: str = ""
    round: int = 0
    """Under way, or the last one done."""
    rounds_done: int = 0
    rounds: int = 0
    needed: int = 1
    """Replies that a round needs: clients.min-replies."""
    deadline: str | None = None
    waiting_for: list[str] = field(default_factory=list)
    waiting_for_more: int = 0
    """So many sites more are needed, which nobody knows yet."""
    waiting_since: str | None = None
    expected_end: str | None = None
    round_seconds: float | None = None
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    lost_messages: int = 0
    failure: str | None = None
    sites: list[SiteStatus] = field(default_factory=list)

    def site(self, name: str) -> SiteStatus:
        """The site of this name, new where there was none."""
        for site in self.sites:
            if site.name == name:
                return site
        self.sites.append(SiteStatus(name))
        self.sites.sort(key=lambda each: each.name)
        return self.site(name)


def _refuse_number(name: str) -> None:
    """Nothing here is infinite, and no program that reads JSON strictly knows NaN."""
    raise ValueError(f"it holds {name}, which is no number")


def read_live_status(folder: Path) -> LiveStatus | None:
    """What status.json says; None where there is none; UsageError where it cannot be read."""
    path = folder / NAME
    try:
        told = json.loads(path.read_bytes(), parse_constant=_refuse_number)
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']!r}, and this version reads {FORMAT}")
        known = {each.name for each in fields(LiveStatus)}
        status = LiveStatus(**{name: value for name, value in told.items() if name in known})
        of_site = {each.name for each in fields(SiteStatus)}
        for moment in (status.updated, status.phase_since, status.waiting_since, status.started):
            datetime.fromisoformat(moment or _now())
        status.sites = [
            SiteStatus(**{name: value for name, value in site.items() if name in of_site})
            for site in told["sites"]
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {quoted(error)}") from error
    for site in status.sites:
        site.name = quoted(site.name, 80)
        site.words = None if site.words is None else quoted(site.words)
    return status


class StatusFile(RunObserver):
    """Keeps status.json up to date, and tells each event to the observer behind it."""

    def __init__(
        self,
        behind: RunObserver,
        folder: Path,
        rounds: int,
        needed: int,
        written: Callable[[LiveStatus], None] = lambda status: None,
    ) -> None:
        """written: called with the status after each time that it was written."""
        self._behind = behind
        self._tell_written = written
        self._folder = folder
        self._written = 0.0
        self._round_seconds: list[float] = []
        self.status = LiveStatus(started=_now(), rounds=rounds, needed=needed)
        self._take_up()
        self._phase("asking who is there")

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """The sites are known."""
        self.status.state, self.status.round, self.status.rounds_done = RUNNING, done, done
        self._heard(roster)
        self._phase("beginning")
        self._behind.run_opened(folder, roster, done, rounds)

    def roster_changed(self, roster: Roster) -> None:
        """Who came, changed or is left out."""
        self._heard(roster)
        self._write()
        self._behind.roster_changed(roster)

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        """The roster has told already."""
        self._behind.clients_came(joined, left_out)

    def waiting(self, waiting: Waiting) -> None:
        """Who answered since, who is silent, who is late."""
        status, now = self.status, _now()
        since = _at(-waiting.seconds)
        status.waiting_since, status.deadline = since, _at(waiting.left)
        changed = status.waiting_for != list(waiting.missing)
        status.waiting_for, status.waiting_for_more = list(waiting.missing), waiting.more
        if waiting.purpose == INTRODUCTIONS:
            for site in status.sites:
                if site.state == "left out" and site.name not in waiting.left_out:
                    site.state, site.words, changed = "absent", None, True
        for name in waiting.here:
            site = status.site(name)
            if site.state in ("absent", "asked", "late"):
                site.answered(now)
        for name in waiting.missing:
            site = status.site(name)
            if name in waiting.late:
                site.late_since = site.late_since or now
            if waiting.purpose == COMING_BACK:
                site.state = "absent"
            else:
                site.state = "late" if name in waiting.late else "asked"
                site.asked_at = since
        for name, why in waiting.left_out.items():
            site = status.site(name)
            changed |= site.state != "left out"
            site.state, site.words, site.late_since = "left out", quoted(why), None
        if changed or time.monotonic() - self._written >= WRITE_EVERY_SECONDS:
            self._write()
        self._behind.waiting(waiting)

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """The cohort is asked."""
        self.status.round, now = server_round, _now()
        for member in cohort:
            site = self.status.site(member.name)
            site.state, site.asked_at, site.answered_at, site.late_since = "asked", now, None, None
        self._phase("training")
        self._behind.round_started(server_round, cohort)

    def present(self, here: tuple[str, ...], gone: tuple[str, ...]) -> None:
        """Who is connected, though it was not asked anything."""
        for name in gone:
            self.status.site(name).state = "absent"
        for name in here:
            site = self.status.site(name)
            if site.state == "absent":
                site.state, site.last_seen = "here", _now()
        self._behind.present(here, gone)

    def phase_started(self, phase: str) -> None:
        """The wait for the clients is over, or another begins."""
        self._phase(phase)
        self._behind.phase_started(phase)

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """What the round brought: for each site, and in all."""
        self._count(record, rejected)
        self._phase("between rounds")
        self._behind.round_finished(record, rejected)

    def run_finished(self, folder: Path) -> None:
        """The adapter is written."""
        self.status.state, self.status.expected_end = FINISHED, None
        self._phase("finished")
        self._behind.run_finished(folder)

    def run_failed(self, words: str) -> None:
        """The run ended before its last round."""
        self.status.state, self.status.failure = FAILED, quoted(words, 2000)
        self.status.expected_end = None
        self._phase("failed")
        self._behind.run_failed(words)

    def how_to_go_on(self, folder: Path) -> str:
        """As whoever watches says."""
        return self._behind.how_to_go_on(folder)

    def _take_up(self) -> None:
        """What the committed rounds tell; nobody has been heard of since."""
        try:
            before = read_live_status(self._folder)
        except UsageError as error:
            log.warning(logfmt("status-begun-anew", reason=error))
            before = None
        for record in read_records(self._folder / "rounds.jsonl"):
            failed = record.get("failures", []) + record.get("evaluation_failures", [])
            self._count(record, [Rejection(each["client"], each["reason"]) for each in failed])
        self.status.lost_messages, self.status.expected_end = 0, None
        seen = {site.name: site.last_seen for site in before.sites} if before else {}
        for site in self.status.sites:
            site.state, site.answered_at = "absent", None
            site.last_seen = seen.get(site.name)
        if before and before.started:
            self.status.started = before.started

    def _heard(self, roster: Roster) -> None:
        known = {*roster.ranks, *roster.left_out}
        self.status.sites = [
            site
            for site in self.status.sites
            if site.name in known or site.bytes_down or site.failures  # no longer "node 12"
        ]
        for member in roster.members:
            site = self.status.site(member.name)
            site.node, site.rank, site.examples = member.node_id, member.rank, member.num_examples
            site.last_seen = site.last_seen or _now()
            if site.state in ("absent", "left out"):
                site.state = "here"
        for name, reason in roster.left_out.items():
            site = self.status.site(name)
            site.words = quoted(reason)
            if name not in roster.ranks:  # else what it said before stands, and it takes part
                site.state = "left out"

    def _count(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        status, now = self.status, _now()
        status.round = status.rounds_done = int(record["round"])
        for loss in ("held_out_loss", "client_held_out_loss"):
            if record.get(loss) is not None:
                status.loss = record[loss]
                break
        prefix = "held_out_"
        status.metrics |= {
            name.removeprefix(prefix): value
            for name, value in record.items()
            if name.startswith(prefix) and name not in ("held_out_loss", "held_out_tokens")
        }
        status.lost_messages = dict(record.get("strays", {})).get("lost", status.lost_messages)
        for client in record.get("clients", []):
            site = status.site(client["client"])
            site.answered(now)
            site.bytes_up += client["bytes_up"]
            site.bytes_down += client["bytes_down"]
            site.seconds, site.loss = client["train_seconds"], client.get("loss")
            site.change = client.get("change_norm")
        for rejection in rejected:
            site = status.site(rejection.client)
            site.state, site.failures = "failed", site.failures + 1
            site.words, site.failed_round = quoted(rejection.reason), status.round
        if status.round > 0 and "seconds" in record:
            self._round_seconds = [*self._round_seconds, record["seconds"]][-ROUNDS_IN_MEAN:]
            status.round_seconds = sum(self._round_seconds) / len(self._round_seconds)
            status.expected_end = _at(status.round_seconds * (status.rounds - status.round))

    def _phase(self, phase: str) -> None:
        self.status.phase, self.status.phase_since = phase, _now()
        self.status.waiting_for, self.status.waiting_for_more = [], 0
        self.status.waiting_since = self.status.deadline = None
        self._write()

    def _write(self) -> None:
        """Whole or not at all; a disk that does not take it is told, and the run goes on."""
        self.status.updated = _now()
        scratch = self._folder / f".writing-{NAME}"
        try:
            scratch.write_text(json.dumps(asdict(self.status), indent=1) + "\n")
            scratch.replace(self._folder / NAME)
        except OSError as error:
            log.warning(logfmt("status-not-written", path=self._folder / NAME, reason=error))
        self._written = time.monotonic()
        self._tell_written(self.status)


def _now() -> str:
    return _at(0.0)


def _at(seconds: float) -> str:
    """The time so many seconds from now."""
    moment = datetime.fromtimestamp(time.time() + min(seconds, 1e9), UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
