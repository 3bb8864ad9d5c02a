"""Many SuperNodes, many rounds of a tiny adapter: is anything lost or mixed up, does anything grow?

    python -m tools.load                       # 16 sites, 200 rounds
    python -m tools.load --sites 8 --rounds 50 --output /tmp/load

A SuperLink with TLS and node keys and as many SuperNodes as asked for, on this machine, with
clients that train nothing (tests/deployment/quick_client.py). Each reports a loss that no other
client and no other round has, and every round must have all of them; the bytes of the result must
be those of the same run in one process. After each round resident memory, open files and threads of
SuperLink, ServerApp and one SuperNode are written to samples.jsonl.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.deployment.quick_client import loss_of
from tests.deployment.small_federation import SmallFederation
from tools.soak_checks import TornError, check_same, committed, records, replayed

PATIENCE_SECONDS = 180.0
"""The longest that one round may take."""
SHOWN = 5
"""Rows of the table."""
WINDOW = 5
"""Rounds of which each row is the median."""


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


class Load:
    """One federation and its one run."""

    def __init__(self, folder: Path, sites: int, rounds: int) -> None:
        self._sites = {f"site-{k:02d}": {"rank": 1 + k % 4} for k in range(sites)}
        self._folder = folder
        self._config: dict[str, Any] = {
            "output": "runs/load",
            "rounds": rounds,
            "seed": 0,
            "clients": {"min-replies": sites, "timeout-seconds": PATIENCE_SECONDS},
            "evaluate": {"server": False},
        }
        self.federation = SmallFederation(
            folder / "federation",
            "server.app:app",
            "tests.deployment.quick_client:app",
            self._sites,
        )
        self._run = self.federation.coordinator / "runs" / "load"
        self.samples: list[dict[str, Any]] = []

    def play(self) -> None:
        """The run, sampled after each round, then checked."""
        self.federation.start()
        self.federation.start_run("run", self._config)
        for number in self._rounds():
            self._sample(number)
        self.federation.loopback.wait_for_end("run")
        self._check()

    def _rounds(self) -> Iterator[int]:
        """Each round when it is committed."""
        seen, since = 0, time.monotonic()
        while seen < self._config["rounds"]:
            try:
                now = committed(self._run)[0]
            except (OSError, ValueError, TornError):
                now = seen  # it is being written
            if now > seen:
                seen, since = now, time.monotonic()
                yield seen
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise TornError(
                    f"no round after {seen} for {PATIENCE_SECONDS:g} s\n"
                    f"{self.federation.loopback.all_logs()}"
                )
            time.sleep(0.1)

    def _sample(self, number: int) -> None:
        loopback = self.federation.loopback
        pids = {"SuperLink": loopback.pid("superlink"), "SuperNode": loopback.pid("site-00")}
        for pid in loopback.tasks_of("superlink", "flwr-serverapp"):
            pids["ServerApp"] = pid
        found: dict[str, Any] = {"round": number}
        for name, pid in pids.items():
            try:
                found[name] = sample(pid)
            except OSError:
                continue  # the run has just ended
        database = self.federation.coordinator / "superlink.db"
        found["database_mb"] = database.stat().st_size / 1e6
        self.samples.append(found)
        with (self._folder / "samples.jsonl").open("a") as file:
            print(json.dumps(found), file=file)
        if number % 10 == 0:
            print(json.dumps(found), flush=True)

    def _check(self) -> None:
        """Every client in every round, with the loss of that client in that round; same bytes."""
        for record in records(self._run)[1:]:
            number = record["round"]
            told = {client["client"]: client["loss"] for client in record["clients"]}
            wanted = {name: loss_of(name, number) for name in self._sites}
            if told != wanted or record["failures"] or any(record["strays"].values()):
                raise TornError(
                    f"round {number}: {told}, failures {record['failures']}, {record['strays']}"
                )
        reference = replayed(
            self._folder / "replay",
            self._run,
            self._config,
            self._sites,
            self.federation.loopback,
        )
        check_same(self._run, reference)

    def summary(self) -> str:
        """Medians over a few rounds, from the beginning to the end."""
        whole = [s for s in self.samples if {"SuperLink", "SuperNode", "ServerApp"} <= s.keys()]
        if len(whole) < WINDOW:
            return "too few rounds to tell"
        lines = ["| rounds | process | memory, MB | open files | threads |"]
        lines.append("| --- | --- | ---: | ---: | ---: |")
        starts = [k * (len(whole) - WINDOW) // (SHOWN - 1) for k in range(SHOWN)]
        for start in starts:
            window = whole[start : start + WINDOW]
            for name in ("SuperLink", "ServerApp", "SuperNode"):
                cells = [
                    f"{statistics.median(s[name][what] for s in window):.0f}"
                    for what in ("mb", "files", "threads")
                ]
                shown = f"{window[0]['round']} to {window[-1]['round']}"
                lines.append(f"| {shown} | {name} | {' | '.join(cells)} |")
        seconds = [record["seconds"] for record in records(self._run)[1:]]
        middle = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        lines.append(
            f"\n{len(self._sites)} sites, {len(seconds)} rounds, {middle} each; superlink.db "
            f"{whole[0]['database_mb']:.1f} MB, then {whole[-1]['database_mb']:.1f} MB"
        )
        return "\n".join(lines)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, help="folder for samples and logs; must not exist")
    arguments = parser.parse_args()
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="bouquet-load-"))
    (folder / "federation").mkdir(parents=True)
    print(f"logs in {folder}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # after cleaning up
    load = Load(folder, arguments.sites, arguments.rounds)
    try:
        load.play()
        print("every client counted in every round; the bytes are those of a replay", flush=True)
    except (TornError, AssertionError) as error:
        print(f"FAILED {type(error).__name__}: {error}", flush=True)
        return 1
    finally:
        load.federation.loopback.stop()
        print(load.summary(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
