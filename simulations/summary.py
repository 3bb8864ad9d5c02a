"""The end of a simulation: base, federated and central side by side, and what to do next."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from settings.run import RunSettings
from simulations.display import human_bytes


def comparison(
    settings: RunSettings, rounds: Sequence[Mapping[str, Any]], central: Mapping[str, Any] | None
) -> Table:
    """Each model's held-out loss, its perplexity, and how many examples it was trained on."""
    base, last = rounds[0].get("held_out_loss"), rounds[-1].get("held_out_loss")
    table = Table(box=None, padding=0, header_style="bold")
    table.add_column("model", no_wrap=True, width=31)
    for name, width in (("held-out loss", 13), ("change", 10), ("perplexity", 12), ("seen", 12)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    batch = settings.local.batch_size * settings.local.accumulation
    steps = sum(c["steps"] for record in rounds[1:] for c in record["clients"])
    rows: list[tuple[str, float | None, str]] = [
        ("base, as shipped", base, "0"),
        (f"federated, {settings.strategy.name}", last, f"{steps * batch:,}"),
    ]
    if central is not None:
        rows.append(
            (
                f"central, rank {central['rank']}, pooled data",
                central["held_out_loss"],
                f"{central['steps'] * batch:,}",
            )
        )
    for name, loss, seen in rows:
        if loss is not None:
            change = f"{loss - base:+.4f}" if base is not None and loss != base else ""
            table.add_row(name, f"{loss:.4f}", change, f"{math.exp(min(loss, 700)):,.1f}", seen)
    return table


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
    other = "zero-padding" if settings.strategy.name == "flora" else "flora"
    console.print("\n[bold]Next[/]")
    hints = [
        (f"less {folder}/rounds.jsonl", "every number of every round"),
        (f"bouquet simulate --resume {folder} --rounds {settings.rounds + 2}", "two rounds more"),
        (f"bouquet simulate --strategy {other}", "the same with another strategy"),
        (f'PeftModel.from_pretrained(base, "{folder}/adapter")', "use the adapter in Python"),
    ]
    width = max(len(command) for command, _ in hints)
    for command, meaning in hints:
        console.print(f"  [cyan]{command:<{width}}[/]  [dim]{meaning}[/]", soft_wrap=True)
