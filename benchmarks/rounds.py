"""A simulated round over a plain PyTorch loop that trains the same tokens on the same cores.

The job is the real one: the ServerApp's loop, messages through the in-process Grid, the ClientApp.
After every round, in the same process, the plain loop (plain_loop.py) trains the same batches and
evaluates the same held-out examples. The first rounds warm both up and are not counted.

Goals: what the clients do, from the server's broadcast to the admitted replies, takes at most 1.05
times the plain training; a whole round, with aggregation, noise and spectra for the log, evaluation
and the saved state, at most 1.05 times plain training and evaluation.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Row, progress, ratios, report
from benchmarks.plain_loop import LOOPS, PlainLoop
from server.admission import Rejection
from server.member import Member
from server.progress import RunObserver, observe_run
from settings.keys import Value
from settings.run import RunSettings, run_settings
from simulations.simulate import prepare, simulate

ROUNDS = 3
WARM_UP = 2
QUICK: dict[str, Value] = {
    "rounds": 4,
    "lora.rank": "8,4",
    "clients.count": 2,
    "local.max-steps": 2,
    "evaluate.max-examples": 32,
}
SAME_WORK = 2e-3
"""Largest relative difference of the two training losses of round 1 that is only rounding."""


class SideBySide(RunObserver):
    """Times each round, and after it the plain loop on the same batches."""

    def __init__(self, settings: RunSettings) -> None:
        self.loop = PlainLoop(settings)
        self.records: list[Mapping[str, Any]] = []
        self.whole: list[float] = []
        self.plain_training: dict[str, list[float]] = {name: [] for name in LOOPS}
        self.plain_whole: dict[str, list[float]] = {name: [] for name in LOOPS}
        self._began = 0.0

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """The clock starts."""
        self._began = time.perf_counter()

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """The clock stops, and the plain loops have their turn, now one first, now the other."""
        seconds = time.perf_counter() - self._began
        number = record["round"]
        if number == 0:
            return
        names = list(LOOPS)[:: 1 if number % 2 else -1]
        measured = {name: self._plain(number, name, record) for name in names}
        progress(
            f"round {number}: {seconds:.1f} s; plain loop "
            + ", ".join(f"{sum(measured[name]):.1f} s ({name})" for name in LOOPS)
        )
        if number <= WARM_UP:
            return
        self.records.append(record)
        self.whole.append(seconds)
        for name, (training, evaluating) in measured.items():
            self.plain_training[name].append(training)
            self.plain_whole[name].append(training + evaluating)

    def _plain(self, number: int, loop: str, record: Mapping[str, Any]) -> tuple[float, float]:
        """Seconds of plain training and of plain evaluation."""
        works = list(self.loop.works(number))
        began = time.perf_counter()
        sums = [self.loop.train(work, loop) for work in works]
        trained = time.perf_counter()
        self.loop.evaluate(loop)
        evaluated = time.perf_counter()
        total, tokens = map(sum, zip(*sums, strict=True))
        same = abs(total / tokens - record["train_loss"]) < SAME_WORK * record["train_loss"]
        if tokens != record["train_tokens"] or (number == 1 and not same):
            raise RuntimeError(
                f"the plain loop does other work: loss {total / tokens:.5f} over {tokens} tokens, "
                f"the round {record['train_loss']:.5f} over {record['train_tokens']}"
            )
        return trained - began, evaluated - trained


def measure(quick: bool) -> Iterator[Row]:
    """Run the job and divide."""
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Value] = QUICK if quick else {"rounds": ROUNDS}
        settings = run_settings({"output": str(Path(folder, "run")), **job})
        prepare(settings)
        watch = SideBySide(settings)
        with observe_run(watch):
            simulate(settings)
    training = [record["train_seconds"] for record in watch.records]
    for name in LOOPS:
        goal = 1.05 if name == "same" else None
        alone, whole = watch.plain_training[name], watch.plain_whole[name]
        yield Row(f"round, client training / plain loop, {name}", ratios(training, alone), goal)
        yield Row(f"round, whole / plain loop, {name}", ratios(watch.whole, whole), goal)
    steps = [sum(c["train_seconds"] for c in record["clients"]) for record in watch.records]
    parts = {
        "packing, merging, checking": [a - b for a, b in zip(training, steps, strict=True)],
        "aggregating": [record["aggregate_seconds"] for record in watch.records],
        "noise and spectra for the log": [record["telemetry_seconds"] for record in watch.records],
        "evaluating": [record["evaluate_seconds"] for record in watch.records],
        "saving": [
            whole - record["seconds"]
            for whole, record in zip(watch.whole, watch.records, strict=True)
        ],
    }
    for name, seconds in parts.items():
        yield Row(f"round, share of {name}", ratios(seconds, watch.whole), kind="share")


if __name__ == "__main__":
    # Set here as `bouquet simulate` sets them: sleeping threads leave the cores to each other.
    report(measure, OMP_WAIT_POLICY="passive", OPENBLAS_NUM_THREADS="1")
