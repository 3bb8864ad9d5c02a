"""How everything here is measured: alternately, side by side, and as ratios of neighbours.

Seconds say little about another machine, and on a shared one they drift. So the thing measured and
what it is compared to run in turn, A B A B, and each A is divided by the B beside it. What stands
in the table is the median of these ratios, and the smallest and the largest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    quantity: str
    values: Sequence[float]
    """One for each repetition."""
    goal: float | None = None
    """The median may be at most this; None where the number is only of interest."""
    kind: str = "ratio"
    """ratio, share (of a whole, shown in per cent) or value."""

    def cells(self) -> list[str]:
        """Quantity, median, range, goal, verdict."""
        shown = {"ratio": "{:.2f} x", "share": "{:.1%}", "value": "{:.3g}"}[self.kind].format
        middle, low, high = (f(self.values) for f in (statistics.median, min, max))
        goal = "-" if self.goal is None else f"at most {shown(self.goal)}"
        verdict = "-" if self.goal is None else "met" if middle <= self.goal else "MISSED"
        spread = "-" if len(self.values) == 1 else f"{shown(low)} to {shown(high)}"
        return [self.quantity, shown(middle), spread, goal, verdict]


def table(rows: Iterable[Row]) -> str:
    """The rows as a table that reads the same in a terminal and in Markdown."""
    lines = [["quantity", "median", "min to max", "goal", "verdict"]]
    lines += [row.cells() for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def alternate(repeats: int, *variants: Callable[[], object]) -> list[list[float]]:
    """Seconds of each variant in each repetition, in turn; one more turn before warms up."""
    seconds: list[list[float]] = [[] for _ in variants]
    for turn in range(repeats + 1):
        for variant, kept in zip(variants, seconds, strict=True):
            began = time.perf_counter()
            variant()
            if turn:
                kept.append(time.perf_counter() - began)
    return seconds


def repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
    """A function that is over too soon for the clock, several times."""

    def run() -> None:
        for _ in range(times):
            function()

    return run


def ratios(measured: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Each measurement over the reference beside it."""
    return [a / b for a, b in zip(measured, reference, strict=True)]


def run_child(command: Sequence[str], **environment: str) -> tuple[float, int, str]:
    """Seconds, peak bytes and standard output of a process; RuntimeError where it fails.

    Peak bytes are the largest resident set of that one process (ru_maxrss of wait4).
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        output.seek(0)
        text = output.read().decode(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{text[-4000:]}")
    return seconds, usage.ru_maxrss * 1024, text


def simulate_command(output: Path, config: dict[str, object]) -> list[str]:
    """`bouquet simulate` with these keys, as a command line."""
    start = "import sys; from commands.cli import main; sys.argv[0] = 'bouquet'; main()"
    keys = [f"--set={name}={value}" for name, value in config.items()]
    return [sys.executable, "-c", start, "simulate", "--output", str(output), *keys]


def progress(text: str) -> None:
    """A word to whoever waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


def machine() -> str:
    """What the numbers depend on besides the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    limits = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(("OMP_", "MKL_", "OPENBLAS_")) and "SIZE" not in name
    ]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}, {versions}"
        + (f"; set: {' '.join(limits)}" if limits else "")
    )


def warn_if_busy() -> None:
    """Where more threads want to run than there are cores, the numbers mean nothing."""
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        progress(f"the load of this machine is {load:.2f}: measure again when it is idle")


def report(measure: Callable[[bool], Iterable[Row]], **environment: str) -> None:
    """Entry point of every module here: measure, print the table, keep the rows if asked to.

    environment: variables that libraries read as they load; the process starts anew with them.
    """
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | environment)
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--rows", type=Path, help="also write the rows to this file, as JSON")
    arguments = parser.parse_args()
    warn_if_busy()
    rows = list(measure(arguments.quick))
    if arguments.rows:
        arguments.rows.write_text(json.dumps([asdict(row) for row in rows]))
    else:
        print(f"{machine()}\n\n{table(rows)}")
