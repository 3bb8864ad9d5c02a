"""`bouquet report`: one page that compares runs which are already there."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from commands import job_options as job
from commands.terminal import console
from core.errors import UsageError
from core.units import counted
from journal.results import Run, read_run


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or of a whole comparison."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write the page; default: the folder itself where one is named, else "
            "reports/001.",
        ),
    ] = None,
    debug: job.DebugOption = False,
) -> None:
    """Write one page, to read without a network, that compares runs.

    RUN is the folder of a run, or of a comparison with all its runs.

    Examples:
      bouquet report comparisons/001

      bouquet report runs/flora-001 runs/fedavg-001 --output mine
    """
    found = [run for folder in runs for run in read_folder(folder)]
    target = output or (runs[0] if len(runs) == 1 else next_number(Path("reports")))
    if target.is_file():
        raise UsageError(f"--output expects a folder, but {target} is a file")
    from reports.page import write_report

    page = write_report(target, told_apart(found))
    console.print(f"{counted(len(found), 'run')} on one page: {page}", soft_wrap=True, markup=False)


def read_folder(folder: Path) -> list[Run]:
    """The run in this folder, or all runs of a comparison's; UsageError where there is neither."""
    from simulations.comparison_folder import is_comparison, read_comparison

    if not folder.is_dir():
        raise UsageError(
            f"expected the folder of a run or of a comparison, but there is no folder {folder}"
        )
    return read_comparison(folder) if is_comparison(folder) else [read_run(folder)]


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name and seed, such as two settings of a strategy, named by their folders too."""
    seen: dict[tuple[str, int], set[Path]] = {}
    for run in runs:
        seen.setdefault((run.name, run.seed), set()).add(run.folder.resolve())
    ambiguous = {name for (name, _), folders in seen.items() if len(folders) > 1}
    unique = {run.folder.resolve(): run for run in runs}.values()
    return [
        replace(run, name=f"{run.name} ({run.folder})") if run.name in ambiguous else run
        for run in unique
    ]


def next_number(parent: Path) -> Path:
    """The first of parent/001, parent/002, ... that does not exist."""
    number = 1
    while (path := parent / f"{number:03d}").exists():
        number += 1
    return path
