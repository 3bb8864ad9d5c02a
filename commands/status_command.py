"""`bouquet status`: who took part in a run, who failed and why, how long and how much."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from commands import job_options as job
from commands.display import CLIENTS_LOSS, HELD_OUT, shown
from commands.terminal import console
from core.errors import quoted
from core.units import human_bytes
from journal.live_status import LiveStatus
from journal.record import LOSS, OWN_LOSS, value_of
from journal.status import Status, in_words, read_status, seconds_since

GOES_ON = 2
LOOK_AGAIN_SECONDS = 1.0
LONGEST_SENTENCE = 1000
WIDE_ENOUGH = 100
WIDE = ("rank", "examples", "loss")
"""Columns that a narrow terminal has no room for."""
FAILURES_SHOWN = 5
"""Of each site, the last."""


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the document for programs: docs/status.md.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run until it ends.")] = False,
    debug: job.DebugOption = False,
) -> None:
    """Tell how a run stands: who answered, who is silent since when, who failed and why.

    Of a simulation or a deployment, also while it goes on or waits for its first site. Exit code
    0: finished; 1: failed or stopped; 2: it goes on; 3: the folder is no run's.

    Example:
      bouquet status coordinator/runs/trial --watch
    """
    found = read_status(run)
    if as_json:
        print(json.dumps(found.document(), indent=1))
    elif watch and console.is_terminal:
        with Live(shown_status(found), console=console, auto_refresh=False) as live:
            while found.exit_code == GOES_ON:
                time.sleep(LOOK_AGAIN_SECONDS)
                found = read_status(run)
                live.update(shown_status(found), refresh=True)
    elif watch:
        said = ""
        while True:
            found = read_status(run)
            if (now := found.sentence()) != said:
                console.print(now, soft_wrap=True, markup=False)
            if found.exit_code != GOES_ON:
                break
            said = now
            time.sleep(LOOK_AGAIN_SECONDS)
    else:
        console.print(shown_status(found))
    raise typer.Exit(found.exit_code)


def shown_status(found: Status) -> Group:
    """The whole of it: the sentence, the rounds, the sites, their failures, what to do."""
    colour = {0: "green", 1: "red"}.get(found.exit_code, "cyan")
    name = escape(str(found.folder))
    parts: list[RenderableType] = [
        Text.from_markup(f"[bold]{name}[/]  {found.strategy}"),
        Text(quoted(found.sentence(), LONGEST_SENTENCE), style=colour),
        Text(),
    ]
    if found.records:
        parts += [rounds_table(found), Text()]
    if found.live and found.live.sites:
        parts += [live_table(found.live), Text()]
    elif found.sites():
        parts += [sites_table(found), Text()]
    for live in found.live.sites if found.live else ():
        if live.state == "left out":
            words = quoted(f"{live.name} is left out: {live.words}", LONGEST_SENTENCE)
            parts.append(Text(words))
    for site in found.sites():
        for server_round, reason in site.failures[-FAILURES_SHOWN:]:
            words = quoted(f"round {server_round}: {site.site} failed: {reason}", LONGEST_SENTENCE)
            parts.append(Text(words))
    if found.live and found.live.expected_end and found.exit_code == GOES_ON:
        parts.append(Text(f"expected to end at {found.live.expected_end}"))
    parts.append(Text(found.next_step()))
    return Group(*parts)


def live_table(live: LiveStatus) -> Table:
    """One row a site, as the server last heard of it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("site", no_wrap=True, min_width=8)
    table.add_column("state", no_wrap=True)
    for name in ("seen", *(() if narrow() else WIDE), "up", "down", "seconds", "failed"):
        table.add_column(name, justify="right", no_wrap=True)
    for site in live.sites:
        wide = (
            shown(site.rank, "{}"),
            shown(site.examples, "{:,}"),
            shown(site.loss, "{:.4f}"),
        )
        style = {"failed": "red", "left out": "red", "late": "yellow"}.get(site.state, "")
        table.add_row(
            escape(quoted(site.name, 80)),
            Text(site.state, style=style),
            f"{in_words(seconds_since(site.last_seen))} ago" if site.last_seen else "-",
            *(() if narrow() else wide),
            human_bytes(site.bytes_up),
            human_bytes(site.bytes_down),
            shown(site.seconds, "{:.0f}"),
            str(site.failures) if site.failures else "-",
        )
    return table


def narrow() -> bool:
    """Whether the terminal has room for the most important columns only."""
    return console.width < WIDE_ENOUGH


def rounds_table(found: Status) -> Table:
    """One row a round."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("round", justify="right")
    table.add_column("took part")
    table.add_column("failed", style="red")
    loss = CLIENTS_LOSS if found.own_losses else HELD_OUT
    for name in ("train loss", loss, "up", "down", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in found.records:
        base = record["round"] == 0
        took_part = [str(client["client"]) for client in record.get("clients", [])]
        held_out = value_of(record, OWN_LOSS if found.own_losses else LOSS)
        table.add_row(
            "base" if base else str(record["round"]),
            str(len(took_part)) if narrow() and took_part else escape(", ".join(took_part)),
            escape(", ".join(str(f["client"]) for f in record.get("failures", []))),
            shown(record.get("train_loss"), "{:.4f}"),
            shown(held_out, "{:.4f}"),
            "-" if base else human_bytes(record["bytes_up"]),
            "-" if base else human_bytes(record["bytes_down"]),
            shown(value_of(record, "evaluate_seconds" if base else "seconds"), "{:.0f}"),
        )
    return table


def sites_table(found: Status) -> Table:
    """One row a site."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("site", no_wrap=True, min_width=8)
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
