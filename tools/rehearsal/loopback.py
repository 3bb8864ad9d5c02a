"""Processes of a federation on the loopback interface that are the test's own, and end with it.

SuperLink and SuperNode start further processes, some in sessions of their own. All of them carry
this test's mark and are killed by it, so that nothing outlives the test, whether it passed or not.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from deployment.processes import MARK, end_all, marked, new_mark
from deployment.trial import open_ports

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240.0
"""How long anything may take before the test gives up; nothing is measured by it."""
AT_WORK_SECONDS = 2.5
"""Of processor time: a ClientApp's start takes less than one, importing torch three and more."""
ENDS_WITH_US = "setpriv --pdeathsig KILL"
"""Before a command: whatever ends the thread that starts it, even kill -9, ends it too."""


class Loopback:
    """A folder, an environment and the processes started in them."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.home = folder / "home"
        self.logs.mkdir()
        self.home.mkdir()
        self._mark = new_mark()
        binaries = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **environment,
            MARK: self._mark,
        }
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: str, cwd: Path) -> subprocess.Popen[bytes]:
        """Start a shell command that goes on; its output goes to logs/NAME.log."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"],
                cwd=cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started[name] = process
        return process

    def run(self, commands: str, cwd: Path, code: int = 0) -> str:
        """Run shell commands to their end; their output. Fails with it on another exit code."""
        process = subprocess.Popen(
            ["sh", "-ec", commands],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == code, f"{commands}\n{output}\n{self.all_logs()}"
        return output

    def log(self, name: str) -> str:
        """What a started process wrote so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def all_logs(self) -> str:
        """The ends of all logs, for the message of a failure."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.logs.glob("*.log"))
        )

    def wait_for(self, name: str, text: str, times: int = 1) -> None:
        """Until the process has written this text so often; fails if it ends before."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self.log(name).count(text) < times:
            ended = self._started[name].poll() is not None and self.log(name).count(text) < times
            if ended or time.monotonic() > give_up:
                raise AssertionError(f"{name} never wrote {text!r}\n{self.all_logs()}")
            time.sleep(0.1)

    def wait_for_end(self, name: str, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit code of a started process."""
        try:
            return self._started[name].wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not end\n{self.all_logs()}") from None

    def kill_task_of(self, name: str, message: str) -> None:
        """SIGKILL the ClientApp that works on the first message logged like this.

        Not before it has worked for a while: one that dies at its start is started again. And not
        that of the message before, which may still be there.
        """
        earlier: set[int] = set()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up:
            tasks = self.tasks_of(name)
            if message not in self.log(name):
                earlier |= tasks
            for pid in tasks - earlier:
                if cpu_seconds(pid) > AT_WORK_SECONDS:
                    os.kill(pid, signal.SIGKILL)
                    return
            time.sleep(0.05)
        raise AssertionError(f"{name} starts no ClientApp after {message!r}\n{self.all_logs()}")

    def tasks_of(self, name: str, program: str = "flwr-clientapp") -> set[int]:
        """What the SuperExec of a SuperNode or SuperLink started; not what that starts itself."""
        parents = _parents()
        return {
            pid
            for pid in self._descendants(self._started[name].pid)
            if program in _command_line(pid)
            and "flower-superexec" in _command_line(parents.get(pid, 0))
        }

    def kill(self, name: str) -> None:
        """SIGKILL a started process itself; what it started may live on."""
        self._started[name].kill()
        self._started[name].wait()

    def pid(self, name: str) -> int:
        """Of a started process."""
        return self._started[name].pid

    def kill_pid(self, pid: int) -> None:
        """SIGKILL one of the processes that were found here; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def has_ended(self, name: str) -> bool:
        """Whether a started process is gone."""
        return self._started[name].poll() is not None

    def stop(self) -> None:
        """End everything: asked first, then killed, then looked for again."""
        end_all(self._mark, grace=2)
        for process in self._started.values():
            process.wait()

    def alive(self) -> list[int]:
        """Processes of the test that are not gone."""
        return marked(self._mark)

    def _descendants(self, root: int) -> list[int]:
        children: dict[int, list[int]] = {}
        for pid, parent in _parents().items():
            children.setdefault(parent, []).append(pid)
        found, waiting = [], [root]
        while waiting:
            below = children.get(waiting.pop(), [])
            found += below
            waiting += below
        return found


def _parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            after_name = stat.read_text(errors="replace").rpartition(")")[2].split()
            found[int(stat.parent.name)] = int(after_name[1])
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that this process has used; 0 where there is none."""
    try:
        after_name = (
            Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return 0.0
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    return open_ports([0] * count)


def is_free(port: int) -> bool:
    """Whether nobody listens on this port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0
