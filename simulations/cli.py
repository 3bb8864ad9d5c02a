"""The command line: `bouquet simulate`, `bouquet options`, `bouquet strategies`."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapters.errors import BouquetError
from settings.keys import Value, read_assignment, walk
from settings.run import RunSettings, default_values, parse_ranks, run_settings

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
console = Console(highlight=False)

WHAT, TRAINING, RUN = "What is federated", "Local training", "The run"


@cli.command(
    epilog="Every other setting is a key: [cyan]--set local.batch-size=8[/]. "
    "[cyan]bouquet options[/] lists all of them."
)
def simulate(
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", "-s", help="flora, fedavg, zero-padding", rich_help_panel=WHAT),
    ] = None,
    clients: Annotated[
        int | None, typer.Option("--clients", "-n", help="How many.", rich_help_panel=WHAT)
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            "--ranks",
            help="One rank for all, or a list dealt in turn: 64,32,16. Without --clients, one "
            "client for each.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of any causal language model.", rich_help_panel=WHAT),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your .jsonl, .json, .csv or .parquet, with fields 'prompt' and 'response' "
            "(map others by --set data.prompt=...).",
            rich_help_panel=WHAT,
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="iid, dirichlet, natural or files.", rich_help_panel=WHAT),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Federated rounds.", rich_help_panel=WHAT)
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="Share of clients sampled each round.", rich_help_panel=WHAT),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over a client's examples a round, as far as --steps lets it.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="At most this many optimizer steps a round (default 8, for a first look); 0: "
            "whole epochs.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Peak rate of AdamW; default 6e-3 on the embedded model, 2e-4 on others.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="All randomness derives from it.", rich_help_panel=RUN)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A new folder; default runs/STRATEGY-001.", rich_help_panel=RUN
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder.", rich_help_panel=RUN),
    ] = None,
    central: Annotated[
        bool,
        typer.Option(
            "--central/--no-central",
            help="Also train one LoRA on the pooled data, as a reference.",
            rich_help_panel=RUN,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of keys, such as another run's config.toml.", rich_help_panel=RUN
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key.", rich_help_panel=RUN),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Federate clients on this machine and watch the held-out loss of the global model.

    Examples:
      bouquet simulate

      bouquet simulate --strategy fedavg --ranks 8 --clients 10

      bouquet simulate --model ./my-model --data chats.jsonl --partition iid --ranks 16,8,8
    """
    options: dict[str, Value | None] = {
        "strategy.name": strategy,
        "clients.count": clients if clients is not None or ranks is None else _count(ranks),
        "lora.rank": ranks,
        "model.path": model,
        "data.path": data,
        "data.partition": partition,
        "rounds": rounds,
        "clients.fraction": fraction,
        "local.epochs": epochs,
        "local.max-steps": steps,
        "local.learning-rate": learning_rate,
        "seed": seed,
        "output": str(output) if output is not None else None,
    }
    layer = {name: value for name, value in options.items() if value is not None}
    layer |= dict(read_assignment(text) for text in set_ or [])
    run_simulation(_settings(layer, config, resume), central)


def _count(ranks: str) -> int | None:
    """As many clients as ranks are listed; one rank says nothing about how many."""
    try:
        listed = parse_ranks(ranks)
    except ValueError:
        return None
    return len(listed) if len(listed) > 1 else None


def _settings(layer: dict[str, Value], config: Path | None, resume: Path | None) -> RunSettings:
    from server.run_folder import read_config

    layers: list[dict[str, Value]] = []
    if resume is not None:
        kept = read_config(resume / "config.toml")
        layers.append(kept)
        layer = {**layer, "output": str(resume), "resume": True}
    elif config is not None:
        layers.append({**read_config(config), "output": "", "resume": False})
    return run_settings(*layers, layer)


def run_simulation(settings: RunSettings, central: bool) -> None:
    """Prepare, run, and sum up."""
    from server.progress import observe_run
    from server.run_folder import RunFolder
    from simulations.display import Display, plan_panel
    from simulations.simulate import prepare
    from simulations.simulate import simulate as simulate_run

    with console.status("[dim]starting[/]") as status:
        plan = prepare(settings, lambda phase: status.update(f"[dim]{phase}[/]"))
    console.print(plan_panel(settings, plan))

    from client.training import observe_steps
    from simulations.central import central_reference
    from simulations.summary import print_summary

    display = Display(console)
    reference: dict[str, Any] | None = None
    try:
        with display.live(), observe_run(display), observe_steps(display.on_step):
            simulate_run(settings, display.on_message)
            assert display.folder is not None
            rounds = RunFolder(display.folder).rounds()
            if central:
                display.phase_started("central reference")
                reference = central_reference(settings, rounds, display.folder)
    except KeyboardInterrupt:
        if display.folder is not None:
            console.print(f"\nstopped; go on with: bouquet simulate --resume {display.folder}")
        raise
    print_summary(console, settings, display.folder, rounds, reference)


@cli.command()
def options() -> None:
    """List every configuration key: its default, its range and what it means."""
    table = Table("key", "default", "range", "meaning", box=None, padding=(0, 1))
    table.columns[0].no_wrap = True
    defaults = default_values()
    for name, kind, rule in walk(RunSettings):
        default = defaults[name]
        shown = str(default).lower() if kind is bool else str(default) or '""'
        table.add_row(f"[cyan]{name}[/]", escape(shown), rule.range(), escape(rule.doc))
    console.print(table)
    console.print(
        "\nSet them by [cyan]--set key=value[/], in a TOML file given to [cyan]--config[/], or by "
        "[cyan]flwr run . --run-config 'key=value'[/]."
    )


@cli.command()
def strategies() -> None:
    """List the aggregation methods and what each promises."""
    from strategies.registry import STRATEGIES, make_strategy

    table = Table("strategy", "ranks may differ", "exact", "a client learns", "source", box=None)
    for name in STRATEGIES:
        p = make_strategy(name).properties
        mixed, exact = ("yes" if flag else "no" for flag in (p.mixed_ranks, p.exact))
        table.add_row(f"[cyan]{name}[/]", mixed, exact, p.reveals, p.source)
    console.print(table)


def main() -> None:
    """Entry point: errors that a person can mend are one message, without a traceback."""
    debug = "--debug" in sys.argv
    # numpy's small decompositions gain nothing from a second thread and lose much where it has to
    # wait for a core. Read once, when numpy is loaded, which is after this.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = cli(standalone_mode=False)
    except BouquetError as error:
        _complain(str(error), debug)
        code = error.exit_code
    except click.ClickException as error:
        _complain(error.format_message(), debug)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = 130
    sys.exit(code or 0)


def _complain(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=not errors.is_terminal)
