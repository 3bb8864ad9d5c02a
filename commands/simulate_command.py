"""`bouquet simulate`: one federation on this machine, watched in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from commands import job_options as job
from commands.terminal import console
from core.errors import UsageError
from journal.record import RoundRecord
from settings.run import RunSettings, run_settings


def simulate(
    context: typer.Context,
    strategy: job.StrategyOption = None,
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
            help="A new folder; default runs/STRATEGY-001.",
            rich_help_panel=job.RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder.", rich_help_panel=job.RUN),
    ] = None,
    central: Annotated[
        bool,
        typer.Option(
            "--central/--no-central",
            help="Also train one LoRA on the pooled data, as a reference.",
            rich_help_panel=job.RUN,
        ),
    ] = False,
    config: job.ConfigOption = None,
    set_: job.SetOption = None,
    debug: job.DebugOption = False,
) -> None:
    """Federate clients on this machine and watch the held-out loss of the global model.

    Examples:
      bouquet simulate

      bouquet simulate --strategy fedavg --ranks 8 --clients 10

      bouquet simulate --model ./my-model --data chats.jsonl --partition iid --ranks 16,8,8
    """
    from journal.run_folder import read_config

    layer = job.job_layer(context.params)
    if resume is not None:
        if not (resume / "config.toml").is_file():
            raise UsageError(
                f"{resume} is no folder of a run: it has no config.toml. `--resume` takes a folder "
                "that `bouquet simulate` wrote, such as runs/flora-001"
            )
        kept = read_config(resume / "config.toml")
        settings = run_settings(kept, layer, {"output": str(resume), "resume": True})
    else:
        where = {"output": str(output)} if output is not None else {}
        settings = run_settings(*job.config_layers(config), where, layer)
    run_simulation(settings, central)


def run_simulation(settings: RunSettings, central: bool) -> None:
    """Prepare, run, and sum up."""
    from commands.summary import print_summary

    settings, folder, rounds, reference = watched_simulation(settings, console, central)
    print_summary(console, settings, folder, rounds, reference)


def watched_simulation(
    settings: RunSettings, console: Console, central: bool = False
) -> tuple[RunSettings, Path, list[RoundRecord], dict[str, Any] | None]:
    """Prepare and run: the settings as they were, the run's folder, its records, and central's.

    Ctrl-C is told with how to go on, and passed on.
    """
    from commands.display import Display, plan_panel
    from journal.run_folder import RunFolder
    from server.method import judged_by_clients
    from server.progress import observe_run
    from simulations.simulate import prepare
    from simulations.simulate import simulate as simulate_run

    display = Display(console, own=judged_by_clients(settings))
    if settings.output:
        with observe_run(display):
            RunFolder(Path(settings.output)).check_fits(settings)
    with console.status("[dim]starting[/]") as status:
        plan = prepare(settings, lambda phase: status.update(f"[dim]{phase}[/]"))
    settings = plan.settings
    console.print(plan_panel(settings, plan, "bouquet simulate"))

    from client.training import observe_steps
    from simulations.central import central_reference

    reference: dict[str, Any] | None = None
    try:
        with display.live(), observe_run(display), observe_steps(display.on_step):
            simulate_run(settings, display.on_message, plan.data)
            assert display.folder is not None
            rounds = RunFolder(display.folder).rounds()
            if central:
                display.phase_started("central reference")
                reference = central_reference(settings, rounds, display.folder)
    except KeyboardInterrupt:
        if display.folder is not None:
            advice = display.how_to_go_on(display.folder)
            console.print(f"\nstopped; {advice}", soft_wrap=True, markup=False)
        raise
    return settings, display.folder, rounds, reference
