"""Where an operator's other tools learn how a run stands: a textfile for Prometheus, a command.

Both are the coordinator's: the words of sites reach a command in its environment only, never in
its arguments, and no shell reads them.
"""

import os
import shlex
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from core.errors import quoted
from core.events import log, logfmt
from journal.live_status import FAILED, FINISHED, RUNNING, WAITING, LiveStatus
from settings.federation import StatusSettings

NOTIFY_SECONDS = 60.0
READABLE = 0o644
"""The exporter is another user, and the SuperLink's own files are for its user alone."""
STATES = (WAITING, RUNNING, FINISHED, FAILED)
SITE_STATES = ("absent", "here", "asked", "answered", "late", "failed", "left out")


class Alarms:
    """Called with the status whenever it is written."""

    def __init__(self, settings: StatusSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder

    def refused(self, words: str) -> None:
        """A start that was refused before it touched the folder: run the command."""
        if self._settings.notify:
            told = LiveStatus(state=FAILED, failure=quoted(words, 2000))
            notify(self._settings.notify, self._folder, told)

    def __call__(self, status: LiveStatus) -> None:
        """Bring the textfile up to date; where the run has failed, run the command."""
        if self._settings.prometheus:
            write_prometheus(Path(self._settings.prometheus), self._folder.name, status)
        if self._settings.notify and status.state == FAILED:
            notify(self._settings.notify, self._folder, status)


def write_prometheus(path: Path, run: str, status: LiveStatus) -> None:
    """The status as metrics for the textfile collector of Prometheus' node exporter.

    run: the label that tells runs apart. Written whole or not at all; a failure is logged.
    """
    scratch = path.with_name(f".{path.name}.writing")
    try:
        scratch.write_text("".join(f"{line}\n" for line in _lines(run, status)))
        scratch.chmod(READABLE)
        scratch.replace(path)
    except OSError as error:
        log.warning(logfmt("prometheus-not-written", path=path, reason=error.strerror))


def notify(command: str, folder: Path, status: LiveStatus) -> None:
    """Run the operator's command; what it needs stands in BOUQUET_RUN, _STATE and _WORDS."""
    told = {
        "BOUQUET_RUN": str(folder),
        "BOUQUET_STATE": status.state,
        "BOUQUET_WORDS": status.failure or "",
    }
    try:
        done = subprocess.run(
            shlex.split(command),
            env=os.environ | told,
            stdin=subprocess.DEVNULL,
            timeout=NOTIFY_SECONDS,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        log.error(logfmt("notify-failed", command=command, reason=error))
    else:
        log.info(logfmt("notified", command=command, exit=done.returncode))


def _lines(run: str, status: LiveStatus) -> Iterator[str]:
    here = f"run={_label(run)}"

    def metric(name: str, help_text: str, samples: dict[str, float]) -> Iterator[str]:
        yield f"# HELP bouquet_{name} {help_text}"
        yield f"# TYPE bouquet_{name} gauge"
        for labels, value in samples.items():
            yield f"bouquet_{name}{{{labels}}} {float(value)}"

    is_in = {f"{here},state={_label(state)}": float(status.state == state) for state in STATES}
    updated = datetime.fromisoformat(status.updated).timestamp()
    yield from metric("run_state", "1 for the state that the run is in.", is_in)
    yield from metric("updated_timestamp_seconds", "When this was written.", {here: updated})
    yield from metric("round", "The round under way, or the last one done.", {here: status.round})
    yield from metric("rounds", "Rounds that the run is asked for.", {here: status.rounds})
    yield from metric("rounds_done", "Rounds committed.", {here: status.rounds_done})
    yield from metric("lost_messages", "Messages that never came.", {here: status.lost_messages})
    silent = len(status.waiting_for) + status.waiting_for_more
    yield from metric("silent_sites", "Sites that are waited for.", {here: silent})
    if status.loss is not None:
        yield from metric("held_out_loss", "The newest held-out loss.", {here: status.loss})
    sites = {f"{here},site={_label(site.name)}": site for site in status.sites}
    yield from metric(
        "site_state",
        "1 for the state that the site is in.",
        {
            f"{labels},state={_label(state)}": float(site.state == state)
            for labels, site in sites.items()
            for state in SITE_STATES
        },
    )
    for name, help_text in (
        ("failures", "Rounds that the site was asked in and did not count."),
        ("bytes_up", "Bytes that the site has sent, of all its rounds."),
        ("bytes_down", "Bytes that the site was sent, of all its rounds."),
    ):
        each = {labels: float(getattr(site, name)) for labels, site in sites.items()}
        yield from metric(f"site_{name}", help_text, each)


def _label(text: str) -> str:
    """Quoted as Prometheus reads it, which knows no other escapes than these."""
    plain = quoted(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"'
