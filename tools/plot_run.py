"""Draw runs beside each other: held-out loss against rounds, and bytes against rounds.

    python -m tools.plot_run runs/flora-001 [runs/zero-padding-001 ...] --output docs/demo.svg

A run's central reference, where it has one, is a dashed line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from journal.record import FILE, RoundRecord, read_rounds, value_of

COLOURS = ["#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e"]


def read_run(folder: Path) -> tuple[list[RoundRecord], dict[str, Any] | None]:
    """The lines of rounds.jsonl, and central.json where there is one."""
    central = folder / "central.json"
    return read_rounds(folder / FILE), (
        json.loads(central.read_text()) if central.exists() else None
    )


def main() -> None:
    """Read the runs and write one picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    plt.rcParams |= {"font.size": 10, "svg.hashsalt": "bouquet", "svg.fonttype": "path"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    for folder, colour in zip(arguments.runs, COLOURS, strict=False):
        rounds, central = read_run(folder)
        name = folder.name.rpartition("-")[0] or folder.name
        numbers = [record["round"] for record in rounds]
        left.plot(numbers, [r["held_out_loss"] for r in rounds], "o-", color=colour, label=name)
        if central is not None:
            loss = central["held_out_loss"]
            left.axhline(loss, color="#495057", linestyle="--", linewidth=1)
            left.annotate("central LoRA", (0, loss), (0, 4), textcoords="offset points")
        for key, style in (("bytes_up", "o-"), ("bytes_down", "s:")):
            words = f"{name}, {key.removeprefix('bytes_')}"
            megabytes = [value_of(record, key) / 1e6 for record in rounds[1:]]
            right.plot(numbers[1:], megabytes, style, color=colour, label=words)
    left.set(xlabel="round (0 is the base model)", ylabel="held-out loss, nats per token")
    right.set(xlabel="round", ylabel="MB, all clients together", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#e9ecef")
        axes.legend(frameon=False)
    figure.savefig(arguments.output, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
