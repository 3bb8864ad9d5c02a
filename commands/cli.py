"""The command line: `bouquet simulate`, `compare`, `deploy` and what goes with them."""

import re
import sys
import traceback
from typing import Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from commands.check_command import check
from commands.compare_command import compare
from commands.deploy_command import deploy
from commands.job_options import MORE_KEYS
from commands.options_command import options
from commands.report_command import report
from commands.simulate_command import simulate
from commands.status_command import status
from commands.terminal import console
from commands.watch_command import watch
from core.errors import BouquetError

cli = typer.Typer(
    name="bouquet",
    help="Federated LoRA fine-tuning: clients of different rank, one base model, aggregation "
    "without noise (FLoRA), and honest comparison with other methods.\n\n"
    "Begin with [cyan]bouquet simulate[/]: ten clients on this machine, on data and a model that "
    "are already here.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.command(epilog=MORE_KEYS)(simulate)
cli.command(epilog=MORE_KEYS)(compare)
cli.command()(report)
cli.add_typer(deploy)
cli.command()(check)
cli.command()(status)
cli.command()(watch)
cli.command()(options)


PROMISES = {
    "mixed_ranks": "mixed ranks",
    "exact": "exact",
    "sums_only": "sums only",
    "personal": "personal",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down",
}
SOURCES = {"reveals": "a client learns", "source": "source"}
"""Like PROMISES: a property of a method -> the heading of its column."""
LEGEND = (
    "mixed ranks: clients may train different ranks. exact: the new global model is the old one "
    "plus the weighted mean of the clients' deltas. sums only: the server needs only weighted sums "
    "of what clients send, as secure aggregation gives. personal: each client has a model of its "
    "own, and there is no global one.\n\n"
    "Bytes are those of one client in one round: b the bytes of a value; M, N, D the sums over "
    "modules of m, n, m + n; r the common rank, r_k the client's, R the largest, S the sum of the "
    "ranks in the cohort; for clients that keep what they were sent."
)


@cli.command()
def strategies() -> None:
    """List the aggregation methods and what each promises."""
    from strategies.registry import make_strategy, strategy_names

    promised = {name: make_strategy(name).properties for name in strategy_names()}
    for columns in (PROMISES, SOURCES):
        table = Table("strategy", *columns.values(), box=None, padding=(0, 1, 0, 0))
        table.columns[0].no_wrap = True
        for name, properties in promised.items():
            cells: list[Any] = [getattr(properties, key) for key in columns]
            words = [{True: "yes", False: "no"}.get(cell, cell) for cell in cells]
            table.add_row(f"[cyan]{name}[/]", *map(escape, words))
        console.print(table)
        console.print()
    console.print(LEGEND, style="dim")


def main() -> None:
    """Entry point: errors that a person can mend are one message, without a traceback."""
    debug = "--debug" in sys.argv
    try:
        code = cli(standalone_mode=False)
    except BouquetError as error:
        _complain(str(error), debug)
        code = error.exit_code
    except click.ClickException as error:
        _complain(error.format_message() + _hint(error.format_message()), debug)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = 130
    sys.exit(code or 0)


def _hint(message: str) -> str:
    """For keys given as Flower's --run-config takes them."""
    keys = re.findall(r"[a-z][a-z0-9.-]*=\S*[^\s)]", message)
    if keys and "unexpected extra argument" in message:
        return f". A key is given by {' '.join(f'--set {key}' for key in keys)}"
    return ""


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=not errors.is_terminal)
