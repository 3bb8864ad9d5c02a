"""The same small job under Flower's own Ray simulation (`flwr run .`) and in process.

Same apps, configuration and data, each as a process from its start to its end: the wall-clock
ratio, and the held-out losses side by side. A SuperLink of our own, on a free port and with its own
FLWR_HOME, is up before the clock starts and ended afterwards: `flwr run` is not charged for it.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import ROOT, Row, progress, ratios, report, run_child, simulate_command
from journal.record import FILE, read_rounds
from tools.rehearsal.simulation_superlink import superlink, tool

REPEATS = 1
CLIENTS = 3
JOB: dict[str, object] = {
    "clients.count": CLIENTS,
    "rounds": 2,
    "lora.rank": "16,8,4",
    "local.max-steps": 4,
    "evaluate.max-examples": 64,
}


def under_ray(environment: dict[str, str]) -> tuple[float, list[float]]:
    """Seconds of `flwr run . --stream`, and the held-out loss of each round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        config = " ".join(
            f"{name}={json.dumps(value)}" for name, value in {**JOB, "output": str(run)}.items()
        )
        command = [tool("flwr"), "run", str(ROOT), "--stream", "--run-config", config]
        command += ["--federation-config", f"num-supernodes={CLIENTS}"]
        seconds, _, text = run_child(command, **environment)
        return seconds, _losses(run, text)


def in_process() -> tuple[float, list[float]]:
    """Seconds of `bouquet simulate`, and the held-out loss of each round."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        seconds, _, text = run_child(simulate_command(run, JOB))
        return seconds, _losses(run, text)


def _losses(run: Path, text: str) -> list[float]:
    rounds = read_rounds(run / FILE)
    if len(rounds) != int(str(JOB["rounds"])) + 1:
        raise RuntimeError(f"the run ended after {len(rounds) - 1} rounds:\n{text[-4000:]}")
    return [record["held_out_loss"] for record in rounds]


def measure(quick: bool) -> Iterator[Row]:
    """In turn: in process, under Ray."""
    ours: list[float] = []
    theirs: list[float] = []
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder, superlink(Path(folder, "flwr")) as environment:
        for turn in range(1 if quick else REPEATS):
            seconds, losses = in_process()
            ray_seconds, ray_losses = under_ray(environment)
            ours.append(seconds)
            theirs.append(ray_seconds)
            apart = max(abs(a - b) for a, b in zip(losses, ray_losses, strict=True))
            progress(f"turn {turn + 1}: {seconds:.1f} s in process, {ray_seconds:.1f} s under Ray")
            for number, (a, b) in enumerate(zip(losses, ray_losses, strict=True)):
                progress(f"  held-out loss after round {number}: {a:.6f} and {b:.6f}")
    yield Row("flwr run, Ray / bouquet simulate", ratios(theirs, ours))
    yield Row("largest difference of their held-out losses", [apart], 1e-3, kind="value")


if __name__ == "__main__":
    report(measure)
