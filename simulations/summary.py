"""The end of a simulation: base, federated and central side by side, and what to do next."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from settings.run import RunSettings
from settings.units import human_bytes
from simulations.display import shown


def comparison(
    settings: RunSettings, rounds: Sequence[Mapping[str, Any]], central: Mapping[str, Any] | None
) -> Table:
    """Each model's held-out loss, what it means, and how many examples it was trained on.

    What it means is the perplexity, or the accuracy where the task is to classify. Where there is
    no global model to evaluate, all are losses on the clients' own held-out parts.
    """
    own = "held_out_loss" not in rounds[-1]
    prefix = "client_held_out" if own else "held_out"
    classifies = settings.task == "classification"
    meaning = "accuracy" if classifies else "perplexity"
    table = Table(box=None, padding=0, header_style="bold")
    table.add_column("model", no_wrap=True, width=31)
    heading = "clients' loss" if own else "held-out loss"
    for name, width in ((heading, 13), ("change", 10), (meaning, 12), ("seen", 12)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    batch = settings.local.batch_size * settings.local.accumulation
    steps = sum(c["steps"] for record in rounds[1:] for c in record["clients"])
    rows: list[tuple[str, Mapping[str, Any], int]] = [
        ("base + adapter" if settings.start.adapter else "base, as shipped", rounds[0], 0),
        (f"federated, {settings.strategy.name}", rounds[-1], steps),
    ]
    if central is not None:
        rows.append((f"central, rank {central['rank']}, pooled data", central, central["steps"]))
    base = rounds[0].get(f"{prefix}_loss")
    for name, record, taken in rows:
        loss = record.get(f"{prefix}_loss")
        if loss is not None:
            change = f"{loss - base:+.4f}" if base is not None and loss != base else ""
            accuracy = _own_accuracy(record) if own else record.get("held_out_accuracy")
            means = shown(accuracy, "{:.3f}") if classifies else f"{math.exp(min(loss, 700)):,.1f}"
            table.add_row(name, f"{loss:.4f}", change, means, f"{taken * batch:,}")
    return table


def _own_accuracy(record: Mapping[str, Any]) -> float | None:
    """The mean over clients, each counting once; None where none said."""
    heard = [client["accuracy"] for client in record["client_held_out"] if "accuracy" in client]
    return statistics.fmean(heard) if heard else None


def print_summary(
    console: Console,
    settings: RunSettings,
    folder: Path,
    rounds: Sequence[Mapping[str, Any]],
    central: Mapping[str, Any] | None,
) -> None:
    """The table, the totals and the next useful commands."""
    console.print()
    console.print(comparison(settings, rounds, central))
    up = sum(record["bytes_up"] for record in rounds[1:])
    down = sum(record["bytes_down"] for record in rounds[1:])
    failures = sum(len(record["failures"]) for record in rounds[1:])
    console.print(
        f"\n[dim]all rounds: {human_bytes(up)} up, {human_bytes(down)} down"
        + (f"; {failures} replies excluded, see rounds.jsonl" if failures else "")
        + "[/]"
    )
    other = "zero-padding" if settings.strategy.name != "zero-padding" else "flora-warm"
    console.print("\n[bold]Next[/]")
    hints = [
        (f"less {folder}/rounds.jsonl", "every number of every round"),
        (f"bouquet simulate --resume {folder} --rounds {settings.rounds + 2}", "two rounds more"),
        (f"bouquet compare -s {settings.strategy.name},{other}", "several side by side"),
    ]
    if (folder / "adapter").is_dir():
        use = f'PeftModel.from_pretrained(base, "{folder}/adapter")'
        hints.append((use, "use the adapter in Python"))
    width = max(len(command) for command, _ in hints)
    for command, meaning in hints:
        console.print(f"  [cyan]{command:<{width}}[/]  [dim]{meaning}[/]", soft_wrap=True)
