"""Tables, numbers and plots of part (a) of docs/study.md, from what tools/study.py left.

    python tools/study_tables.py studies docs/study

prints the tables in Markdown, and writes sst2.csv and sst2-accuracy.png. Where a run was
evaluated after both of its last rounds, its numbers are the means of the two.
"""

import csv
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from journal.record import read_rounds, value_of
from journal.results import REFERENCES
from journal.run_folder import read_config
from reports import figure_style as style
from settings.run import run_settings
from tasks.partition import global_held_out

CELLS = {
    "sst2-rank16-alpha0.5": "rank 16, Dirichlet 0.5",
    "sst2-mixed-alpha0.5": "mixed ranks, Dirichlet 0.5",
    "sst2-rank16-alpha0.1": "rank 16, Dirichlet 0.1",
    "sst2-mixed-alpha0.1": "mixed ranks, Dirichlet 0.1",
}
LAST = 2
KEPT = {"held_out_accuracy": "accuracy", "held_out_loss": "loss", "client_held_out_loss": "own"}
Numbers = dict[str, float]
Runs = dict[tuple[str, int], Numbers]


def read_cell(folder: Path) -> Runs:
    """(Method, seed) -> its numbers, for every run that came to its last round."""
    found: Runs = {}
    for path in sorted(folder.glob("runs/*/seed-*/rounds.jsonl")):
        name, seed = path.parts[-3], int(path.parts[-2].removeprefix("seed-"))
        rounds = read_rounds(path)
        rest = read_config(path.parent / "config.toml")
        if rounds[-1]["round"] < int(rest["rounds"]):
            continue
        ends = [r for r in rounds[1:] if "client_held_out" in r][-LAST:]
        numbers = {
            short: statistics.fmean(value_of(record, key) for record in ends)
            for key, short in KEPT.items()
            if key in ends[-1]
        }
        heard = [r["client_held_out"] for r in ends]
        numbers["own_accuracy"] = statistics.fmean(
            sum(c["accuracy"] * c["tokens"] for c in each) / sum(c["tokens"] for c in each)
            for each in heard
        )
        numbers["worst"] = statistics.fmean(max(c["loss"] for c in each) for each in heard)
        if "accuracy" in numbers:
            numbers["swing"] = abs(ends[-1]["held_out_accuracy"] - ends[0]["held_out_accuracy"])
        if name not in REFERENCES:
            if rounds[-1]["aggregation_noise"] is not None:
                numbers["noise"] = rounds[-1]["aggregation_noise"]
            numbers["megabytes"] = sum(r["bytes_up"] + r["bytes_down"] for r in rounds[1:]) / 1e6
        settings = run_settings(rest)
        held_out = global_held_out(
            settings.data,
            settings.clients.count,
            seed,
            settings.evaluate.max_examples,
            "classification",
        )
        ones = statistics.fmean(example.response == "1" for example in held_out)
        found[name, seed] = numbers | {"majority": max(ones, 1 - ones)}
    return found


def names_of(runs: Runs) -> list[str]:
    """The methods by their mean loss less that of flora, so that a missing seed moves none.

    Behind them those without a global model, then the references.
    """

    def place(name: str) -> tuple[bool, bool, float]:
        found = less(runs, name, "flora", "loss")
        return name in REFERENCES, not found, statistics.fmean(found) if found else 0.0

    return sorted({name for name, _ in runs}, key=place)


def values(runs: Runs, name: str, key: str) -> list[float]:
    """One number of a method in every seed that has it."""
    return [n[key] for (each, _), n in sorted(runs.items()) if each == name and key in n]


def spread(found: Iterable[float], digits: int = 3, sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    listed = list(found)
    if not listed:
        return ""
    if len(listed) < 2:
        return f"{listed[0]:{sign}.{digits}f}"
    mean, deviation = statistics.fmean(listed), statistics.stdev(listed)
    return f"{mean:{sign}.{digits}f} ± {deviation:.{digits}f}"


def less(runs: Runs, name: str, other: str, key: str) -> list[float]:
    """The method's number less the other's, seed by seed."""
    seeds = sorted(seed for each, seed in runs if each == name)
    pairs = [(runs[name, seed], runs.get((other, seed), {})) for seed in seeds]
    return [mine[key] - its[key] for mine, its in pairs if key in mine and key in its]


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table, the first column to the left."""
    print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def print_cell(title: str, runs: Runs) -> None:
    """Both tables of a cell."""
    names = names_of(runs)
    methods = [name for name in names if name not in REFERENCES and values(runs, name, "loss")]

    def mean(name: str, key: str) -> float:
        return statistics.fmean(values(runs, name, key))

    seeds = len({seed for _, seed in runs})
    rows = []
    for name in names:
        noise = f"{mean(name, 'noise'):.2g}" if values(runs, name, "noise") else ""
        size = f"{mean(name, 'megabytes'):.0f} MB" if noise else ""
        cells = [spread(values(runs, name, key)) for key in ("accuracy", "loss", "own")]
        own = spread(values(runs, name, "own_accuracy"))
        label = name if name in REFERENCES else f"`{name}`"
        if (here := len(values(runs, name, "own"))) < seeds:
            label += f" ({here} seeds)"
        rows.append([label, *cells, own, f"{mean(name, 'worst'):.2f}", noise, size])
    swing = statistics.fmean(each for name in methods for each in values(runs, name, "swing"))
    majority = spread(values(runs, methods[0], "majority"))
    print(f"{title}: {seeds} seeds, majority {majority}, between the last rounds {swing:.3f}\n")
    table(
        ["method", "accuracy", "loss", "own loss", "own accuracy", "worst", "noise", "bytes"], rows
    )
    rows = []
    for name in methods:
        row = [f"`{name}`"]
        for key in ("accuracy", "loss"):
            found = less(runs, name, "flora", key)
            listed = ", ".join(f"{each:+.3f}" for each in found)
            row += ["", ""] if name == "flora" else [listed, spread(found, sign="+")]
        for key in ("accuracy", "loss"):
            found = less(runs, name, methods[0], key)
            row.append("" if name == methods[0] else spread(found, sign="+"))
        rows.append(row)
    best = f"`{methods[0]}`"
    head = ["method", "accuracy less that of `flora`", "mean", "loss less that of `flora`", "mean"]
    table([*head, f"accuracy less {best}", f"loss less {best}"], rows)


def write_numbers(cells: dict[str, Runs], path: Path) -> None:
    """Every number of every run."""
    columns = ["accuracy", "loss", "own", "own_accuracy", "worst", "noise", "megabytes"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cell", "method", "seed", *columns])
        for cell, runs in cells.items():
            for (name, seed), numbers in sorted(runs.items()):
                found = [f"{numbers[key]:.4g}" if key in numbers else "" for key in columns]
                writer.writerow([cell, name, seed, *found])


def colour_of(name: str) -> str:
    """One for the references, one for FLoRA and its variant, one for the others."""
    if name in REFERENCES:
        return style.REFERENCE
    return style.HUES[1][0] if name in ("flora", "flora-warm") else style.HUES[0][0]


def plot_accuracy(cells: dict[str, Runs], path: Path) -> None:
    """A dot for each seed and a bar for their mean, a panel for each cell."""
    figure = style.new_figure(style.WIDE, 7.2)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (cell, runs) in zip(panels.flat, cells.items(), strict=False):
        names = [name for name in names_of(runs) if values(runs, name, "accuracy")]
        for at, name in enumerate(names):
            found = values(runs, name, "accuracy")
            colour = colour_of(name)
            axes.plot(found, [at] * len(found), "o", color=colour, markersize=4, alpha=0.6)
            axes.plot(
                statistics.fmean(found), at, "|", color=colour, markersize=13, markeredgewidth=2
            )
        majority = statistics.fmean(n["majority"] for n in runs.values())
        axes.axvline(majority, color=style.RULE, linestyle=(0, (2, 2)), linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_title(CELLS[cell])
    figure.supxlabel(
        "held-out accuracy after the last two rounds: each seed (dots), their mean (bars); "
        "dotted: the larger class",
        fontsize=9,
        color=style.MUTED,
    )
    figure.savefig(path, dpi=110, facecolor="white")


def main() -> None:
    """The tables of all cells that are there."""
    studies, output = Path(sys.argv[1]), Path(sys.argv[2])
    cells = {cell: read_cell(studies / cell) for cell in CELLS if (studies / cell).is_dir()}
    for cell, runs in cells.items():
        print_cell(CELLS[cell], runs)
    output.mkdir(parents=True, exist_ok=True)
    write_numbers(cells, output / "sst2.csv")
    with style.styled():
        plot_accuracy(cells, output / "sst2-accuracy.png")


if __name__ == "__main__":
    main()
