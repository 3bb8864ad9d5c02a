"""status.json in the run's folder: how the run stands now. Its fields: docs/status.md.

It is only the present: rounds.jsonl remains the record of what is committed.
"""

import json
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path

from core.errors import UsageError, quoted

FORMAT = "bouquet-status-1"


NAME = "status.json"


WAITING = "waiting"


RUNNING = "running"


FINISHED = "finished"


FAILED = "failed"


STOPPED = "stopped"


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
            if moment:
                datetime.fromisoformat(moment)
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
