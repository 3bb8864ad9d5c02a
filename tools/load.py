"""Many SuperNodes, many rounds of a tiny adapter: is anything lost or mixed up, does anything grow?

    python -m tools.load                                   # 2, 4, 8 and 16 sites, 50 rounds each
    python -m tools.load --sites 16 --rounds 200 --output /var/tmp/load

For each number of sites a SuperLink with TLS, node keys and its database on disk, and as many
SuperNodes, on this machine, with clients that train nothing (tools/rehearsal/quick_client.py).
Each client reports a loss that no other client and no other round has, and every round must have
all of them; the bytes of the result must be those of the same run in one process.

Written as it goes, below the output folder: load.log (a line a round), samples.jsonl (after each
round memory, open files and threads of SuperLink, ServerApp and the largest SuperNode), and
tables.md after each federation. Ctrl-C, or SIGTERM, ends everything that it started and tells
what was reached. Exits with 1 if a federation did not end as it must, or was interrupted.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from journal.record import FILE, read_rounds
from tools.load_summary import Outcome, growth, table
from tools.rehearsal.loopback import ENDS_WITH_US
from tools.rehearsal.quick_client import loss_of
from tools.rehearsal.small_federation import SmallFederation
from tools.soak_checks import TornError, check_same, committed, replayed

PATIENCE_SECONDS = 300.0
"""The longest that one round may take."""
POLL_SECONDS = "1.0"
"""How often Flower's SuperExec looks for work: its default. At 0.1, which makes the tests quick, a
federation of 16 idle sites takes most of a core."""


class Interrupted(BaseException):
    """Somebody asked to stop."""


class Load:
    """One federation and its one run."""

    def __init__(self, folder: Path, sites: int, rounds: int, say: Callable[[str], None]) -> None:
        self.outcome = Outcome(sites, rounds)
        self._sites = {f"site-{k:02d}": {"rank": 1 + k % 4} for k in range(sites)}
        self._folder = folder
        self._say = say
        self._config: dict[str, Any] = {
            "output": "runs/load",
            "rounds": rounds,
            "seed": 0,
            "clients": {"min-replies": sites, "timeout-seconds": PATIENCE_SECONDS},
            "evaluate": {"server": False},
        }
        (folder / "federation").mkdir(parents=True)
        self._federation = SmallFederation(
            folder / "federation",
            "server.app:app",
            "tools.rehearsal.quick_client:app",
            self._sites,
            prefix=ENDS_WITH_US,
            environment={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_SECONDS},
        )
        self._run = self._federation.coordinator / "runs" / "load"

    def play(self) -> None:
        """The run, sampled after each round, then compared; what went wrong is in the outcome."""
        try:
            self._federation.start()
            self._federation.start_run("run", self._config)
            for number in self._rounds():
                self._sample(number)
            self._federation.loopback.wait_for_end("run")
            self._look()
            self._compare()
        except AssertionError as error:
            self.outcome.error = f"{type(error).__name__}: {error}"
        except Interrupted:
            self.outcome.error = "interrupted"
            raise
        finally:
            self._federation.loopback.stop()
            self._look()

    def _rounds(self) -> Iterator[int]:
        """Each round when it is committed."""
        seen, since = 0, time.monotonic()
        while seen < self.outcome.rounds:
            try:
                now = committed(self._run)[0]
            except (OSError, ValueError, TornError):
                now = seen  # it is being written
            if now > seen:
                seen, since = now, time.monotonic()
                yield seen
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise TornError(f"no round after {seen} for {PATIENCE_SECONDS:g} s")
            time.sleep(0.2)

    def _sample(self, number: int) -> None:
        loopback = self._federation.loopback
        found: dict[str, Any] = {"round": number, "sites": self.outcome.sites}
        try:
            found["SuperLink"] = sample(loopback.pid("superlink"))
            nodes = [sample(loopback.pid(name)) for name in self._sites]
            found["SuperNodes"] = {what: max(node[what] for node in nodes) for what in nodes[0]}
            for pid in loopback.tasks_of("superlink", "flwr-serverapp"):
                found["ServerApp"] = sample(pid)
        except OSError:
            pass  # the run has just ended
        database = self._federation.coordinator / "superlink.db"
        found["database_mb"] = database.stat().st_size / 1e6
        self.outcome.samples.append(found)
        with (self._folder / "samples.jsonl").open("a") as file:
            print(json.dumps(found), file=file)
        self._look()
        self._say(
            f"sites={self.outcome.sites} round={number} "
            f"of={self.outcome.rounds} seconds={self.outcome.seconds[-1]:.1f} "
            f"missing={self.outcome.missing} mixed={self.outcome.mixed} "
            f"lost={self.outcome.lost} locked={self.outcome.locked} load={os.getloadavg()[0]:.1f}"
        )

    def _look(self) -> None:
        """Every committed round: who counted, and with whose loss."""
        logs = [
            path.read_text(errors="replace") for path in self._federation.loopback.logs.iterdir()
        ]
        self.outcome.locked = sum(
            log.count(words) for log in logs for words in ("database is locked", "QueuePool limit")
        )
        self.outcome.lost = sum(
            log.count(f"Failed to {what} message") for log in logs for what in ("send", "receive")
        )
        played = read_rounds(self._run / FILE)[1:]
        self.outcome.seconds = [record["seconds"] for record in played]
        told = [
            client["loss"] == loss_of(client["client"], record["round"])
            for record in played
            for client in record["clients"]
        ]
        self.outcome.counted, self.outcome.mixed = told.count(True), told.count(False)
        self.outcome.strays = sum(sum(record["strays"].values()) for record in played)

    def _compare(self) -> None:
        """With the same run in one process."""
        reference = replayed(
            self._folder / "replay",
            self._run,
            self._config,
            self._sites,
            self._federation.loopback,
        )
        self.outcome.bytes_same = False
        check_same(self._run, reference)
        self.outcome.bytes_same = True


def sample(pid: int) -> dict[str, float]:
    """Memory in MB, open files and threads of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        "threads": int(status["Threads"]),
    }


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sites", default="2,4,8,16", help="how many, one federation after another"
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, help="folder on a disk; must not exist")
    arguments = parser.parse_args()
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="bouquet-load-"))
    folder.mkdir(parents=True, exist_ok=arguments.output is None)
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, _interrupt)
    numbers = [int(number) for number in arguments.sites.split(",")]
    outcomes: list[Outcome] = []
    with (folder / "load.log").open("a") as log:
        say = partial(_say, log)
        say(f"output={folder} on={_file_system(folder)} {_machine()}")
        try:
            for sites in numbers:
                load = Load(folder / f"sites-{sites:02d}", sites, arguments.rounds, say)
                outcomes.append(load.outcome)
                load.play()
                (folder / "tables.md").write_text(_tables(outcomes))
        except Interrupted:
            say("interrupted; this is what was reached")
        finally:
            (folder / "tables.md").write_text(_tables(outcomes))
            say(_tables(outcomes))
    return 0 if [one.good for one in outcomes] == [True] * len(numbers) else 1


def _say(log: TextIO, text: str) -> None:
    """To whoever watches, and to load.log."""
    line = f"{time.strftime('%H:%M:%S')} {text}"
    print(line, file=log, flush=True)
    print(line, flush=True)


def _tables(outcomes: Sequence[Outcome]) -> str:
    errors = [f"{one.sites} sites: {one.error}" for one in outcomes if one.error]
    return "\n\n".join([table(outcomes), *map(growth, outcomes), *errors]) + "\n"


def _interrupt(*_: object) -> None:
    for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)  # cleaning up is not interrupted
    raise Interrupted


def _file_system(folder: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"cores={os.cpu_count()} cpu={models[0] if models else '?'} load={os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
