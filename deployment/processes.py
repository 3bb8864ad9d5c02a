"""Processes of one mark: whatever was started with it, and all that these started in turn.

The mark is a random word in the environment, which every process hands on to those that it starts,
also into sessions of their own and when its parent is long dead. So all of them are found, and
nothing else: a process id that the system gave to a stranger has not the mark in its environment.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from core.errors import UsageError

MARK = "BOUQUET_MARK"
GRACE_SECONDS = 5.0
"""Between the request to end and the kill."""
TAIL = 1500
"""Of a log, in the message of a failure."""


def new_mark() -> str:
    """A word that no other process has."""
    return secrets.token_hex(16)


def refuse_without_proc() -> None:
    """UsageError where the system does not tell the environment of a process."""
    if not Path("/proc/self/environ").exists():
        raise UsageError(
            "processes are found by their environment in /proc, which Linux has and this system "
            "has not: start the parts by hand, as docs/deploy.md tells"
        )


def marked(mark: str) -> list[int]:
    """The processes with this mark that have not ended."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if has_mark(path.name, mark)]


def has_mark(pid: int | str, mark: str) -> bool:
    """Whether this process lives and has the mark; of another user's there is no telling."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def end_all(mark: str, grace: float = GRACE_SECONDS) -> int:
    """End every process with this mark: asked first, then killed. How many there were."""
    found = set(marked(mark))
    for pid in found:
        _signal(pid, mark, signal.SIGTERM)
    give_up = time.monotonic() + grace
    while marked(mark) and time.monotonic() < give_up:
        time.sleep(0.1)
    while left := marked(mark):
        found |= set(left)
        for pid in left:
            _signal(pid, mark, signal.SIGKILL)
        time.sleep(0.05)
    return len(found)


def _signal(pid: int, mark: str, number: int) -> None:
    """To this process and no later one of the same id: looked at again once it is held fast."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if has_mark(pid, mark):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


class Daemons:
    """Starts commands that go on, each with the mark and with a log NAME.log of its own."""

    def __init__(self, mark: str, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs = logs
        self._environment = {**environment, MARK: mark}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def pids(self) -> dict[str, int]:
        """Of what was started here, by name."""
        return {name: process.pid for name, process in self._started.items()}

    def start(self, name: str, command: Sequence[str], cwd: Path) -> "subprocess.Popen[bytes]":
        """In a session of its own, so that Ctrl-C at the terminal does not reach it."""
        with (self.logs / f"{name}.log").open("ab") as log:
            self._started[name] = subprocess.Popen(
                command,
                cwd=cwd,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._started[name]

    def log(self, name: str) -> str:
        """What it wrote so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, seconds: float) -> None:
        """Until it has written this; UsageError with the end of its log if it ends or is late."""
        self._wait(name, lambda: text in self.log(name), seconds, f"never wrote {text!r}")

    def finish(self, name: str, seconds: float) -> None:
        """Until it has ended well; UsageError with the end of its log otherwise."""
        process = self._started[name]
        self._wait(name, lambda: process.poll() == 0, seconds, "failed")

    def _wait(self, name: str, done: Callable[[], bool], seconds: float, failure: str) -> None:
        give_up = time.monotonic() + seconds
        while not done():
            ended = self._started[name].poll() is not None and not done()
            if ended or time.monotonic() > give_up:
                raise UsageError(
                    f"{name} {failure}{'' if ended else f' within {seconds:g} s'}; the end of "
                    f"{self.logs / name}.log:\n{self.log(name)[-TAIL:]}"
                )
            time.sleep(0.1)
