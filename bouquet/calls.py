"""The calls: what `bouquet simulate` and `bouquet compare` do, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bouquet.keywords import layer_of
from bouquet.process import console_of, process_as_found
from bouquet.results import Comparison, Run
from bouquet.rooms import at_home
from core.errors import UsageError


@at_home()
@process_as_found()
def simulate(
    strategy: str | None = None,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    config: str | Path | None = None,
    central: bool = False,
    progress: bool = True,
    **keys: Any,
) -> Run:
    """Federate clients on this machine, and return the finished run.

    keys: the job, by the names of the command's options (`model`, `data`, `ranks`, `clients`,
    `rounds`, `steps`, `learning_rate`, `seed` ...) and by any key of the configuration:
    `local={"batch_size": 8}` or `**{"local.batch-size": 8}`. `bouquet options` lists all.
    output: a new folder; by default runs/STRATEGY-001 where Python runs.
    resume: the folder of a run to go on with, under its own keys and these over them.
    config: a TOML file of keys, such as another run's config.toml.
    central: also train one LoRA on the pooled data, as a reference.
    progress: show each round as it ends, on the standard error.

    Raises UsageError for what a person can mend before anything is written, BouquetError for a run
    that ends early; the messages are those of the command.
    """
    from commands.job_options import config_layers
    from commands.simulate_command import watched_simulation
    from journal.run_folder import read_config
    from settings.run import run_settings

    layer = layer_of({"strategy": strategy, **keys})
    if resume is not None:
        if output is not None or config is not None:
            raise UsageError("resume names the folder of a run, which has its output and its keys")
        kept = read_config(open_folder(resume).folder / "config.toml")
        settings = run_settings(kept, layer, {"output": str(resume), "resume": True})
    else:
        where = {} if output is None else {"output": str(output)}
        settings = run_settings(*config_layers(_path(config)), where, layer)
    _, folder, _, _ = watched_simulation(settings, console_of(progress), central)
    return Run(folder)


@at_home()
@process_as_found()
def compare(
    strategies: Sequence[str],
    *,
    seeds: int = 3,
    equal_bytes: bool = False,
    tune_rates: Sequence[float] = (),
    output: str | Path | None = None,
    config: str | Path | None = None,
    progress: bool = True,
    **keys: Any,
) -> Comparison:
    """Run strategies on the same job, with the same data, batches and seeds, and compare them.

    strategies: names such as `flora`; `all`; and the references `central` and `local`.
    seeds: runs of each: `seed`, the next, and so on.
    equal_bytes: the cheaper ones go on until the dearest one's bytes are spent.
    tune_rates: learning rates out of which each method takes its own best.
    output: a new folder, or that of a comparison to go on with; by default comparisons/001.
    All else as in `simulate`.
    """
    from commands.compare_command import comparison_layers, run_comparison
    from commands.job_options import config_layers
    from simulations.compare import choose_names
    from simulations.tuning import parse_rates

    if seeds < 1:
        raise UsageError(f"seeds must be at least 1; got {seeds}")
    listed = strategies if isinstance(strategies, str) else ",".join(strategies)
    layers, ranks = comparison_layers([*config_layers(_path(config)), layer_of(keys)])
    rates = parse_rates(",".join(map(str, tune_rates))) if tune_rates else []
    page = run_comparison(
        layers,
        choose_names(listed, ranks),
        seeds,
        equal_bytes,
        _path(output),
        console_of(progress),
        rates,
        lambda path: f"the same call, with output={str(path)!r}",
    )
    return Comparison(page.parent)


@at_home()
def open_folder(folder: str | Path) -> Any:
    """The Run or the Comparison in this folder, finished or not.

    Raises UsageError where the folder holds neither.
    """
    from simulations.comparison_folder import is_comparison

    path = Path(folder)
    if not path.is_dir():
        raise UsageError(
            f"expected the folder of a run or of a comparison, but there is no folder {path}"
        )
    return Comparison(path) if is_comparison(path) else Run(path)


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
