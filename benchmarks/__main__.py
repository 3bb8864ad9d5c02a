"""Measure everything and print one table.

    python -m benchmarks                  # everything: about half an hour on two cores
    python -m benchmarks algebra memory   # only these
    python -m benchmarks --quick          # tiny sizes: does it run at all? The numbers mean nothing

Each benchmark runs in a process of its own, so that none inherits another's memory or threads, and
can be run alone: `python -m benchmarks.rounds`. Exits with 0 whether goals are met or missed, and
with 1 only where something could not be measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import ROOT, Row, machine, progress, table, warn_if_busy

BENCHMARKS = {
    "rounds": "a simulated round over a plain PyTorch loop",
    "jobs": "`bouquet simulate` as a process over a plain job",
    "flower": "the same job under Flower's Ray simulation over in process",
    "memory": "peak memory with many clients over one",
    "algebra": "stack, refactor and the wire codec over memcpy and one matrix product",
    "wire": "bytes of an adapter in each number format over raw float32, and what it costs",
    "deployed": "a round over the network over one of Flower's FedAvg and one raw array",
    "costs": "what the server computes in a round, in seconds and by the number of clients",
    "truncation": "flexlora and florist by stacked factors over the dense route",
}


def measure(name: str, quick: bool) -> list[Row]:
    """The rows of one benchmark, run as its own process; RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "rows.json")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--rows", str(kept)]
        done = subprocess.run(command + ["--quick"] * quick, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"benchmarks.{name} ended with {done.returncode}")
        return [Row(**row) for row in json.loads(kept.read_text())]


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; numbers mean nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {sorted(unknown)[0]}; there are {', '.join(BENCHMARKS)}")
    warn_if_busy()
    rows: list[Row] = []
    failed: list[str] = []
    began = time.monotonic()
    for name in arguments.names or BENCHMARKS:
        print(f"{name}: {BENCHMARKS[name]}", file=sys.stderr, flush=True)
        try:
            rows += measure(name, arguments.quick)
        except RuntimeError as error:
            progress(str(error))
            failed.append(name)
    missed = [row.quantity for row in rows if row.cells()[-1] == "MISSED"]
    print(f"\n{machine()}\n\n{table(rows)}\n")
    print(f"{len(missed)} goals missed" + "".join(f"\n  {quantity}" for quantity in missed))
    if failed:
        print(f"not measured: {', '.join(failed)}")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
