"""`bouquet status`: who took part in a run, who failed and why, how long and how much."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deployment.status import Status, read_status
from settings.units import counted, human_bytes
from simulations import job_options as job
from simulations.display import HELD_OUT, OWN_LOSS, shown
from simulations.terminal import console


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    debug: job.DebugOption = False,
) -> None:
    """Tell how a run stands, from its rounds.jsonl, also while it goes on.

    `flwr list LINK` tells which runs a SuperLink knows and which of them go on.

    Example:
      bouquet status coordinator/runs/trial
    """
    found = read_status(run)
    console.print(
        f"[bold]{escape(str(run))}[/]  {found.strategy}, {found.done} of "
        f"{counted(found.wanted, 'round')}\n"
    )
    if found.records:
        console.print(rounds_table(found))
        console.print()
    if sites := found.sites():
        console.print(sites_table(found))
        console.print()
        for site in sites:
            for server_round, reason in site.failures:
                console.print(
                    f"round {server_round}: {site.site} failed: {reason}",
                    soft_wrap=True,
                    markup=False,
                )
    console.print(found.next_step(), soft_wrap=True, markup=False)


def rounds_table(found: Status) -> Table:
    """One row a round."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("round", justify="right")
    table.add_column("took part")
    table.add_column("failed", style="red")
    loss = OWN_LOSS if found.own_losses else HELD_OUT
    for name in ("train loss", loss, "up", "down", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in found.records:
        base = record["round"] == 0
        held_out = record.get("client_held_out_loss" if found.own_losses else "held_out_loss")
        table.add_row(
            "base" if base else str(record["round"]),
            escape(", ".join(str(c["client"]) for c in record.get("clients", []))),
            escape(", ".join(str(f["client"]) for f in record.get("failures", []))),
            shown(record.get("train_loss"), "{:.4f}"),
            shown(held_out, "{:.4f}"),
            "-" if base else human_bytes(record["bytes_up"]),
            "-" if base else human_bytes(record["bytes_down"]),
            shown(record.get("evaluate_seconds" if base else "seconds"), "{:.0f}"),
        )
    return table


def sites_table(found: Status) -> Table:
    """One row a site."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("site")
    for name in ("rank", "examples", "rounds", "failed", "trained", "up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    for site in found.sites():
        table.add_row(
            escape(site.site),
            "-" if site.rank is None else str(site.rank),
            f"{site.num_examples:,}" if site.rounds else "-",
            str(len(site.rounds)),
            str(len(site.failures)),
            f"{site.train_seconds:.0f} s",
            human_bytes(site.bytes_up),
            human_bytes(site.bytes_down),
        )
    return table
