"""The study of docs/study.md: every method on two tasks, side by side.

    python tools/study.py --model MINILM_FOLDER --data sst2/train.jsonl --output studies

Each cell is one `bouquet compare` in a process of its own, on one thread; as many cells run at a
time as there are cores. A cell that is there already goes on where it stopped. Logs lie beside
the cells; the results of each are in its report.html, results.json and results.csv.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIXED = "64,32,16,16,8,8,4,4,4,4"
EITHER = "flora,flora-warm,hetlora,flexlora,lora-fair,florist"
ANY_RANKS = f"{EITHER},zero-padding,rbla"
# At one rank zero-padding and rbla are fedavg (tests/strategies/test_equivalences.py).
ONE_RANK = f"fedavg,{EITHER},ffa-lora,rolora,fedex-lora,fedsa-lora,frlora,flora-na,central,local"

UNEVEN = (
    *("--set", "data.dirichlet-alpha=0.1", "--rounds", "20", "--steps", "4"),
    *("--set", "evaluate.every=19"),
)
"""Clients of nearly one label each drift apart in 12 steps: more rounds of fewer steps."""


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    name: str
    options: Sequence[str]


def sst2(name: str, ranks: str, strategies: str, *options: str) -> Cell:
    """A cell of part (a); model and data are added from the command line."""
    job = ["--config", "experiments/sst2.toml", "--clients", "10", "--ranks", ranks]
    return Cell(name, ["--strategies", strategies, *job, *options])


def docstrings(name: str, *options: str) -> Cell:
    """A cell of part (b)."""
    return Cell(name, ["--config", "experiments/docstrings.toml", *options])


def warm_starts(task: str, cell: Cell) -> list[Cell]:
    """FLoRA under the start policies that the cell leaves out, on the same data."""
    at = list(cell.options)
    at[at.index("--strategies") + 1] = "flora"
    choices = [("keep-a", "fresh"), ("increment", "fresh"), ("random", "kept"), ("global", "kept")]
    return [
        Cell(
            f"{task}-start-{policy}-{optimizer}",
            [*at, "--set", f"start.policy={policy}", "--set", f"start.optimizer={optimizer}"],
        )
        for policy, optimizer in choices
    ]


DOCSTRINGS = docstrings("docstrings-mixed", "--strategies", f"{ANY_RANKS},central,local")
CELLS = [
    DOCSTRINGS,
    *warm_starts("docstrings", DOCSTRINGS),
    sst2("sst2-rank16-alpha0.5", "16", ONE_RANK),
    sst2("sst2-rank16-alpha0.1", "16", ONE_RANK, *UNEVEN),
    sst2("sst2-mixed-alpha0.5", MIXED, ANY_RANKS),
    sst2("sst2-mixed-alpha0.1", MIXED, ANY_RANKS, *UNEVEN),
]


def run(cell: Cell, model: str, data: str, seeds: int, output: Path) -> int:
    """One cell to its end; its exit code."""
    given = ["--model", model, "--data", data] if cell.name.startswith("sst2") else []
    command = [sys.executable, "-m", "bouquet", "compare", *cell.options, *given]
    command += ["--seeds", str(seeds), "--output", str(output / cell.name)]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    began = time.monotonic()
    with (output / f"{cell.name}.log").open("a") as log:
        code = subprocess.call(
            command, cwd=ROOT, env=os.environ | one_thread, stdout=log, stderr=subprocess.STDOUT
        )
    minutes = (time.monotonic() - began) / 60
    print(f"{cell.name}: exit code {code} after {minutes:.1f} minutes", flush=True)
    return code


def main() -> None:
    """Run the cells, as many at a time as there are cores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the pretrained encoder")
    parser.add_argument("--data", required=True, help="train.jsonl of SST-2")
    parser.add_argument("--output", type=Path, default=Path("studies"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", help="only these, with commas", default="")
    chosen = parser.parse_args()
    names = [name for name in chosen.cells.split(",") if name]
    cells = [cell for cell in CELLS if not names or cell.name in names]
    output = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model, data = (str(Path(path).expanduser().resolve()) for path in (chosen.model, chosen.data))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        codes = pool.map(lambda cell: run(cell, model, data, chosen.seeds, output), cells)
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    main()
