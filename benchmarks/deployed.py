"""A round over the network: an adapter in one array, over one in an array for each tensor.

One SuperLink and two SuperNodes on this machine, without TLS. One ServerApp plays in turn a round
of Bouquet's server (strategy fedavg), of Flower's own FedAvg, and one exchange of a single uint8
array of the same size (benchmarks/deployed_apps.py); the first turn warms up. Clients train
nothing. Every round ends with the same things done: two replies received and, but for the single
array, their mean; Bouquet also checks every reply, logs and saves its state.
"""

import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.deployed_apps import JOB, VARIANTS
from benchmarks.measuring import Row, progress, ratios, report
from tools.rehearsal.small_federation import SmallFederation

SIZES = {"448 tensors": (32, 8)}
"""Layers of seven modules, and rank."""
ROUNDS = {"448 tensors": 5}
SECONDS_A_TURN = 180.0
"""The longest that a turn may take on average."""
DATABASE = "    --database 'sqlite:///superlink.db?plugin=bouquet' \\\n"
"""Left out: with it, FedAvg's many small writes lock it for so long that its run ends."""
POLL_SECONDS = "1.0"
"""How often Flower's SuperExec looks for work: its default."""


def seconds_of(layers: int, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round of each variant, and where Bouquet's went."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "seconds.json")
        job = {"layers": layers, "rank": rank, "rounds": rounds, "output": str(output)}
        federation = SmallFederation(
            Path(folder),
            "benchmarks.deployed_apps:server_app",
            "benchmarks.deployed_apps:client_app",
            {"a": {}, "bb": {}},
            insecure=True,
            environment={
                "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_SECONDS,
                JOB: json.dumps(job),
            },
        )
        loopback = federation.loopback
        try:
            federation.start()
            federation.start_run("run", {})
            give_up = time.monotonic() + SECONDS_A_TURN * rounds
            while not _is_whole(found := _read(output), rounds):
                if time.monotonic() > give_up:
                    raise RuntimeError(
                        f"not every round was played: {found}\n{loopback.all_logs()}"
                    )
                time.sleep(0.5)  # `flwr run` may end before the run does
        finally:
            loopback.stop()
    return found


def _read(output: Path) -> dict[str, Any]:
    """What the ServerApp has measured so far."""
    try:
        found: dict[str, Any] = json.loads(output.read_text())
    except (OSError, ValueError):
        return {}  # it is being written
    return found


def _is_whole(found: dict[str, Any], rounds: int) -> bool:
    return all(len(found.get("seconds", {}).get(name, [])) == rounds for name in VARIANTS)


def measure(quick: bool) -> Iterator[Row]:
    """Each size in a federation of its own."""
    for name, (layers, rank) in {"quick": (2, 2)}.items() if quick else SIZES.items():
        found = seconds_of(layers, rank, 2 if quick else ROUNDS[name])
        seconds = {variant: found["seconds"][variant][1:] for variant in VARIANTS}
        for variant, measured in seconds.items():
            told = ", ".join(f"{second:.1f}" for second in measured)
            progress(f"{name}, {variant}: {told} s; median {statistics.median(measured):.1f} s")
        for part in found["parts"][-1]:
            values = [parts[part] for parts in found["parts"][1:]]
            progress(f"{name}, bouquet, {part}: median {statistics.median(values):.2f} s")
        yield Row(
            f"{name}: Bouquet / Flower's FedAvg",
            ratios(seconds["bouquet"], seconds["flower"]),
            0.25,
        )
        yield Row(f"{name}: Bouquet / a raw array", ratios(seconds["bouquet"], seconds["raw"]), 1.2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # after cleaning up
    report(measure)
