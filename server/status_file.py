"""status.json in the run's folder: how the run stands now, for people and programs that watch.

Written by the server at each event and while it waits, whole or not at all; docs/status.md says
what each field means. rounds.jsonl remains the record of what is committed: this file is only the
present, and a run goes on without it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from core.errors import UsageError, quoted
from core.events import log, logfmt
from journal.live_status import (
    FAILED,
    FINISHED,
    NAME,
    RUNNING,
    LiveStatus,
    read_live_status,
)
from journal.record import FILE, LOSS, OWN_LOSS, RoundRecord, read_rounds, value_of
from server.admission import Rejection
from server.member import Member
from server.progress import RunObserver
from server.roster import Roster
from server.waiting import COMING_BACK, INTRODUCTIONS, Waiting

WRITE_EVERY_SECONDS = 5.0
ROUNDS_IN_MEAN = 5


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

    def round_finished(self, record: RoundRecord, rejected: list[Rejection]) -> None:
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
        for record in read_rounds(self._folder / FILE):
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

    def _count(self, record: RoundRecord, rejected: list[Rejection]) -> None:
        status, now = self.status, _now()
        status.round = status.rounds_done = int(record["round"])
        losses = (value_of(record, key) for key in (LOSS, OWN_LOSS))
        status.loss = next((loss for loss in losses if loss is not None), status.loss)
        prefix = "held_out_"
        status.metrics |= {
            name.removeprefix(prefix): value_of(record, name)
            for name in record
            if name.startswith(prefix) and name not in (LOSS, "held_out_tokens")
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
