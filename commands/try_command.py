"""`bouquet deploy try` and `stop`: a whole deployment on this machine, begun and ended."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from commands import job_options as job
from commands.terminal import console
from core.errors import UsageError

PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")]


def try_out(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder; delete it afterwards.")
    ],
    sites: Annotated[
        int | None,
        typer.Option("--sites", min=1, max=16, help="How many; default 3, or one for each rank."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Start a run; or only SuperLink and SuperNodes.")
    ] = True,
    fleet_port: PortOption = 0,
    control_port: PortOption = 0,
    strategy: job.StrategyOption = None,
    ranks: job.RanksOption = None,
    rounds: job.RoundsOption = None,
    steps: job.StepsOption = None,
    seed: job.SeedOption = None,
    config: job.ConfigOption = None,
    set_: job.SetOption = None,
    debug: job.DebugOption = False,
) -> None:
    """A coordinator and sites on this machine, with TLS and keys, and a run among them.

    Everything is made as `bouquet deploy init` makes it; the sites share the data and the model
    that `bouquet simulate` begins with. Afterwards all of it still runs, until
    `bouquet deploy stop DIR`.

    Example:
      bouquet deploy try here --sites 3 --rounds 2
    """
    from deployment.flower_version import refuse_http
    from deployment.trial import create_trial
    from settings.run import run_settings

    refuse_http()
    layer = job.job_layer(context.params)
    count = sites or int(layer.get("clients.count", 3))
    given = {**{k: v for each in job.config_layers(config) for k, v in each.items()}, **layer}
    given |= {"clients.count": count}
    settings = run_settings(given)
    for key in ("output", "resume"):
        given.pop(key, None)
        if key in layer:
            raise UsageError(f"{key} is not for a trial: its run is in DIR/coordinator/runs/trial")
    trial = create_trial(folder, settings.ranks(), given, fleet_port, control_port)
    try:
        trial.start(_say)
        if run:
            for line in trial.run():
                console.print(Text.from_ansi(line), soft_wrap=True, highlight=False)
    except BaseException:
        _say(f"{_ended(stop_quietly(folder))}; the logs are in {folder}/logs")
        raise
    finished = run and _finished(trial.run_folder)
    if run:
        rest = "" if finished else f"; the sites' logs are in {folder}/logs"
        outcome = "finished" if finished else "FAILED"
        _say(f"the run {outcome}: bouquet status {trial.run_folder}{rest}")
    _say(f"all of it still runs: bouquet deploy stop {folder} ends it")
    if run and not finished:
        raise typer.Exit(1)


def stop(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `try` was given.")],
    debug: job.DebugOption = False,
) -> None:
    """End every process of a trial, also what a crash left behind. Its folder stays."""
    from deployment.trial import stop_trial

    _say(_ended(stop_trial(folder)))


def stop_quietly(folder: Path) -> int:
    """How many processes were ended; none where nothing was started yet."""
    from deployment.trial import TRIAL_FILE, stop_trial

    return stop_trial(folder) if (folder / TRIAL_FILE).is_file() else 0


def _finished(run: Path) -> bool:
    """Whether the run ended well; one that failed early has no folder."""
    from journal.status import read_status

    try:
        return read_status(run).finished
    except UsageError:
        return False


def _ended(count: int) -> str:
    return f"ended {count} processes" if count else "nothing was running"


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)
