"""`bouquet compare`: the same job under several strategies and seeds."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from commands import job_options as job
from commands.report_command import next_number
from commands.terminal import console
from core.errors import BouquetError, UsageError, listing
from settings.keys import Value, flatten
from strategies.registry import STRATEGIES


def compare(
    context: typer.Context,
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies",
            "-s",
            help=f"Names with commas, out of {', '.join(STRATEGIES)}; all: each of them that takes "
            "the clients' ranks; central: one LoRA on the pooled data; local: each client alone.",
            rich_help_panel=job.WHAT,
        ),
    ],
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Runs of each: --seed, the next, and so on.", rich_help_panel=job.WHAT
        ),
    ] = 3,
    equal_bytes: Annotated[
        bool,
        typer.Option(
            "--equal-bytes",
            help="After --rounds rounds, every other strategy goes on until one more round would "
            "send more bytes, up and down together, than the dearest sent in --rounds rounds with "
            "that seed; at most 4 times --rounds. central and local are not extended.",
            rich_help_panel=job.WHAT,
        ),
    ] = False,
    tune_rates: Annotated[
        str,
        typer.Option(
            "--tune-rates",
            metavar="RATES",
            help="Learning rates with commas, such as 3e-4,1e-3,3e-3: each strategy and reference "
            "runs once with each, on a seed that is not reported, and takes the one that ends at "
            "the lowest held-out loss. Instead of --lr, which is the same for all.",
            rich_help_panel=job.WHAT,
        ),
    ] = "",
    task: job.TaskOption = None,
    clients: job.ClientsOption = None,
    ranks: job.RanksOption = None,
    model: job.ModelOption = None,
    start_from: job.StartFromOption = None,
    data: job.DataOption = None,
    eval_data: job.EvalDataOption = None,
    partition: job.PartitionOption = None,
    rounds: job.RoundsOption = None,
    fraction: job.FractionOption = None,
    epochs: job.EpochsOption = None,
    steps: job.StepsOption = None,
    learning_rate: job.LearningRateOption = None,
    seed: job.SeedOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A new folder, or that of a comparison to go on with; default comparisons/001.",
            rich_help_panel=job.RUN,
        ),
    ] = None,
    config: job.ConfigOption = None,
    set_: job.SetOption = None,
    debug: job.DebugOption = False,
) -> None:
    """Run strategies on the same job, with the same data, batches and seeds, and compare them.

    The clients evaluate on their own held-out parts, too, where they hold out any, unless
    evaluate.clients says otherwise.

    The same command with --output of a comparison goes on with it.

    Examples:
      bouquet compare --strategies flora,zero-padding,central,local

      bouquet compare --strategies all --ranks 8 --clients 10 --seeds 5 --equal-bytes
    """
    from simulations.compare import choose_names
    from simulations.tuning import parse_rates

    layers, each_rank = comparison_layers(
        [*job.config_layers(config), job.job_layer(context.params)]
    )
    if tune_rates and learning_rate is not None:
        raise UsageError(
            "--tune-rates chooses each method's learning rate, and --lr sets one for all: give one "
            "of the two"
        )
    rates = parse_rates(tune_rates) if tune_rates else []
    names = choose_names(strategies, each_rank)
    page = run_comparison(
        layers, names, seeds, equal_bytes, output, console, rates, lambda path: _again(output, path)
    )
    console.print(f"\neverything on one page: {page}", soft_wrap=True, markup=False)
    console.print(
        f"every number: {page.parent}/results.json, {page.parent}/results.csv", soft_wrap=True
    )


def comparison_layers(
    layers: Sequence[Mapping[str, Value]],
) -> tuple[list[Mapping[str, Value]], list[int]]:
    """The configuration that all runs share, and the clients' ranks.

    Clients that hold something out evaluate on it, unless a layer says otherwise.
    """
    from simulations.compare import shared_settings

    settings = shared_settings(layers)
    held_out = settings.data.client_held_out_share() > 0
    return [*([{"evaluate.clients": True}] if held_out else []), *layers], settings.ranks()


def run_comparison(
    layers: Sequence[Mapping[str, Value]],
    names: Sequence[str],
    seeds: int,
    equal_bytes: bool,
    output: Path | None,
    console: Console,
    rates: Sequence[float],
    again: Callable[[Path], str],
) -> Path:
    """Prepare, tune, run all, and write the page, whose path it returns.

    again: what is called to go on with the comparison in this folder, for who interrupts it.
    BouquetError where no run could be finished.
    """
    from commands.comparison_display import ComparisonDisplay, print_results
    from commands.display import plan_panel
    from journal.results import summary_rows, write_results
    from simulations.compare import Runner, shared_settings
    from simulations.comparison_folder import open_comparison
    from simulations.simulate import prepare

    settings = shared_settings(layers)
    with console.status("[dim]starting[/]") as status:
        plan = prepare(settings, lambda phase: status.update(f"[dim]{phase}[/]"))
    settings = plan.settings
    layers = [*layers, {"data.labels": settings.data.labels}]
    path = output or next_number(Path("comparisons"))
    comparison = open_comparison(
        path, names, seeds, equal_bytes, flatten(settings), rates, plan.data
    )
    entries = comparison.entries()
    count = len(entries) + len(comparison.names) * len(comparison.rates)
    played = listing(sorted({entry.seed for entry in entries}))
    methods = f"[bold]{', '.join(comparison.names)}[/]; seeds {played}"
    console.print(plan_panel(settings, plan, "bouquet compare", methods))
    display = ComparisonDisplay(console, count, settings.rounds)
    try:
        with display.live():
            Runner(comparison, layers, display).play()
    except KeyboardInterrupt:
        console.print(f"\nstopped; go on with: {again(path)}", soft_wrap=True, markup=False)
        raise
    runs = list(comparison.runs())
    write_results(path, runs)
    print_results(console, summary_rows(runs))
    if all(run.failure is not None for run in runs):
        raise BouquetError(f"none of {len(runs)} runs could be finished; {path} says why")
    from reports.page import write_report

    return write_report(path, runs)


def _again(output: Path | None, path: Path) -> str:
    """The command line that was given, with the folder to go on in."""
    where = [] if output is not None else ["--output", str(path)]
    return shlex.join(["bouquet", *sys.argv[1:], *where])
