"""`bouquet check`: is everything in place at this site, before it joins?"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from commands import job_options as job
from commands.terminal import console

if TYPE_CHECKING:
    from deployment.findings import Finding

COLOURS = {"OK": "green", "note": "yellow", "mend": "bold red"}


def check(
    site: Annotated[
        Path,
        typer.Argument(metavar="SITE", help="The site's folder, or the coordinator's."),
    ] = Path(),
    identity: Annotated[
        str, typer.Option(help="Of the base model, as the coordinator announced it.")
    ] = "",
    offline: Annotated[
        bool, typer.Option("--offline", help="Leave out key, certificate, SuperLink and clock.")
    ] = False,
    config: job.ConfigOption = None,
    set_: job.SetOption = None,
    debug: job.DebugOption = False,
) -> None:
    """Check a site before it joins: each check prints a line, OK or what is wrong and what to do.

    In the coordinator's folder: flower, certificate, keys, ports, database, disk, sites.

    The exit code is 1 if anything is wrong. The run's keys matter to data, memory and identity:
    give them by --config or --set as the coordinator will.

    Examples:
      bouquet check sites/oslo --config run.toml --identity 16b426c7cc42a7cab301219cd56c40eb

      bouquet check . --offline --set data.context=512
    """
    from deployment.coordinator_checks import check_coordinator, is_coordinator
    from deployment.findings import fine
    from deployment.site_file import read_site
    from settings.run import run_settings

    if is_coordinator(site):
        if _told(check_coordinator(site)):
            raise typer.Exit(1)
        start = f"{site}/start-superlink.sh starts its SuperLink, where that does not run"
        console.print(f"\nthe coordinator is ready: {start}", soft_wrap=True)
        return
    found = read_site(site)
    layer = job.job_layer({"set_": set_})
    settings = run_settings(*job.config_layers(config, lists=False), layer)

    def findings() -> "Iterator[Finding]":
        from deployment.connection_checks import check_connection

        yield fine("site.toml", f"{found.site.name}, SuperLink {found.superlink}")
        if not offline:
            yield from check_connection(found)
        from deployment.site_checks import check_site

        yield from check_site(found.site, settings, identity)

    if wrong := _told(findings()):
        console.print(f"\n{wrong} to mend before {found.site.name} can take part")
        raise typer.Exit(1)
    console.print(f"\n{found.site.name} can join: {site}/start-supernode.sh", soft_wrap=True)


def _told(findings: Iterable["Finding"]) -> int:
    """A line each; how many are to be mended."""
    wrong = 0
    for finding in findings:
        verdict = finding.verdict.value
        line = (
            f"[{COLOURS[verdict]}]{verdict:<4}[/]  {finding.subject:<11} {escape(finding.sentence)}"
        )
        console.print(line, soft_wrap=True)
        wrong += verdict == "mend"
    return wrong
