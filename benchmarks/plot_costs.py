"""Seconds of a round's aggregation and telemetry over the number of clients, as a plot for docs/.

python -m benchmarks.plot_costs             # about a minute on a quiet machine
"""

import csv

import matplotlib.pyplot as plt

from benchmarks.costs import CLIENTS, METHODS, scaling
from benchmarks.measuring import ROOT, warn_if_busy

FOLDER = ROOT / "docs" / "benchmarks"


def main() -> None:
    """Measure, and write docs/benchmarks/costs.png and costs.csv."""
    warn_if_busy()
    FOLDER.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    rows: list[list[object]] = []
    for method in METHODS:
        found = scaling(method)
        best = [min(found[count], key=lambda each: each.both) for count in CLIENTS]
        axes.loglog(CLIENTS, [each.both for each in best], marker="o", label=method)
        rows += [
            [method, count, round(each.aggregating, 4), round(each.telemetry, 4)]
            for count, each in zip(CLIENTS, best, strict=True)
        ]
    last = max(best[-1].both, 1e-9)
    line = [last * count / CLIENTS[-1] for count in CLIENTS]
    axes.loglog(CLIENTS, line, color="0.6", linestyle=":", label="linear")
    axes.set(xlabel="clients in the round", ylabel="seconds, aggregation and telemetry")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(FOLDER / "costs.png", dpi=160)
    with (FOLDER / "costs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "clients", "aggregate_seconds", "telemetry_seconds"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
