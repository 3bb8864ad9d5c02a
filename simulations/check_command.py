"""`bouquet check`: is everything in place at this site, before it joins?"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from simulations import job_options as job
from simulations.terminal import console

COLOURS = {"OK": "green", "note": "yellow", "mend": "bold red"}


def check(
    site: Annotated[
        Path, typer.Argument(metavar="SITE", help="The site's folder, with its site.toml.")
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

    The exit code is 1 if anything is wrong. The run's keys matter to data, memory and identity:
    give them by --config or --set as the coordinator will.

    Examples:
      bouquet check sites/oslo --config run.toml --identity 16b426c7cc42a7cab301219cd56c40eb

      bouquet check . --offline --set data.context=512
    """
    from deployment.findings import Finding, Verdict
    from deployment.site_file import read_site
    from settings.run import run_settings

    found = read_site(site)
    layer = job.job_layer({"set_": set_})
    settings = run_settings(*job.config_layers(config, lists=False), layer)

    def findings() -> Iterator[Finding]:
        from deployment.connection_checks import check_connection

        yield Finding("site.toml", Verdict.OK, f"{found.site.name}, SuperLink {found.superlink}")
        if not offline:
            yield from check_connection(found)
        from deployment.site_checks import check_site

        yield from check_site(found.site, settings, identity)

    wrong = 0
    for finding in findings():
        verdict = finding.verdict.value
        line = (
            f"[{COLOURS[verdict]}]{verdict:<4}[/]  {finding.subject:<11} {escape(finding.sentence)}"
        )
        console.print(line, soft_wrap=True)
        wrong += finding.verdict is Verdict.MEND
    if wrong:
        console.print(f"\n{wrong} to mend before {found.site.name} can take part")
        raise typer.Exit(1)
    console.print(f"\n{found.site.name} can join: {site}/start-supernode.sh", soft_wrap=True)
