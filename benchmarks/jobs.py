"""The whole `bouquet simulate` job, as a process, over a plain job of the same steps.

Both are timed from the start of the process to its end: imports, model, data, the default run's
training (three rounds of ten clients), and evaluation before the first and after every round. The
plain job is plain_loop.py. Goal: at most 1.15 times as long.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import Row, progress, ratios, report, run_child, simulate_command
from benchmarks.plain_loop import LOOPS
from journal.record import FILE, read_rounds

REPEATS = 1
QUICK = {
    "rounds": 1,
    "lora.rank": "8,4",
    "clients.count": 2,
    "local.max-steps": 2,
    "evaluate.max-examples": 32,
}


def federated(job: dict[str, object]) -> tuple[float, dict[str, float]]:
    """Seconds of `bouquet simulate`, and what it trained."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        seconds, _, _ = run_child(simulate_command(run, job))
        rounds = read_rounds(run / FILE)
    tokens = sum(record["train_tokens"] for record in rounds[1:])
    return seconds, {"base_loss": rounds[0]["held_out_loss"], "train_tokens": tokens}


def plain(job: dict[str, object], loop: str) -> tuple[float, dict[str, float]]:
    """Seconds of the plain job, and what it trained."""
    keys = [f"--set={name}={value}" for name, value in job.items()]
    command = [sys.executable, "-m", "benchmarks.plain_loop", "--loop", loop, *keys]
    seconds, _, output = run_child(command)
    return seconds, json.loads(output.strip().splitlines()[-1])


def measure(quick: bool) -> Iterator[Row]:
    """In turn: ours, the plain job that computes the same, and the one written by hand."""
    job: dict[str, object] = dict(QUICK if quick else {})
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(1 if quick else REPEATS):
        seconds, did = federated(job)
        ours.append(seconds)
        for loop, kept in theirs.items():
            plain_seconds, plain_did = plain(job, loop)
            kept.append(plain_seconds)
            if plain_did["train_tokens"] != did["train_tokens"] or (
                abs(plain_did["base_loss"] - did["base_loss"]) > 1e-3
            ):
                raise RuntimeError(f"the jobs differ: {did} here, {plain_did} in the plain one")
        progress(
            f"turn {turn + 1}: {seconds:.1f} s; plain job "
            + ", ".join(f"{kept[-1]:.1f} s ({loop})" for loop, kept in theirs.items())
        )
    yield Row("job / plain job, same", ratios(ours, theirs["same"]), 1.15)
    yield Row("job / plain job, by-hand", ratios(ours, theirs["by-hand"]))


if __name__ == "__main__":
    report(measure)
