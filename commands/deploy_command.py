"""`bouquet deploy`: the folders, certificates, keys and scripts of separate sites."""

from pathlib import Path
from typing import Annotated

import typer

from commands import job_options as job
from commands.terminal import console
from commands.try_command import stop, try_out
from core.errors import UsageError

deploy = typer.Typer(
    name="deploy",
    help="Set up a coordinator and its sites: certificates, keys, start scripts. "
    "docs/deploy.md takes you through it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
deploy.command("try", epilog=job.MORE_KEYS)(try_out)
deploy.command()(stop)
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
SiteArgument = Annotated[Path, typer.Argument(metavar="SITE", help="A site's folder.")]


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    address: Annotated[
        list[str],
        typer.Option(
            help="DNS name or IP address under which sites reach the coordinator; repeated, the "
            "certificate holds them all and sites use the first."
        ),
    ],
    sites: Annotated[
        str, typer.Option(help="Names with commas: oslo,bergen. More can be added later.")
    ] = "",
    link: Annotated[
        str, typer.Option(help="What `flwr run . LINK` will call it; default: the folder's name.")
    ] = "",
    fleet_port: Annotated[
        int,
        typer.Option(min=1, max=65535, envvar="BOUQUET_FLEET_PORT", help="Where sites connect."),
    ] = 9092,
    control_port: Annotated[
        int,
        typer.Option(
            min=1,
            max=65535,
            envvar="BOUQUET_CONTROL_PORT",
            help="Where the operator's flwr connects, from this machine.",
        ),
    ] = 8000,
    sites_make_keys: Annotated[
        bool,
        typer.Option(
            "--sites-make-keys",
            help="Make no keys for the sites: each makes its own and sends you the public half.",
        ),
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of sites, for the SuperLink's unit; repeatable."),
    ] = None,
    install: Annotated[
        str, typer.Option(help="Folder of coordinator or site, and of venv/bin, in systemd units.")
    ] = "/opt/bouquet",
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="No TLS and no keys: only for trying out on one machine."),
    ] = False,
    debug: job.DebugOption = False,
) -> None:
    """Write a new deployment: an authority, the coordinator's folder, one folder for each site.

    Examples:
      bouquet deploy init trial --address fed.example.org --sites oslo,bergen,tromso

      bouquet deploy init here --address localhost --sites one,two --insecure
    """
    from deployment.flower_version import refuse_http
    from deployment.folder import create_deployment
    from deployment.plan import Plan, site_names

    if not insecure:
        refuse_http()
    plan = Plan(
        link=link or folder.resolve().name.lower(),
        address=address[0],
        other_addresses=tuple(address[1:]),
        fleet_port=fleet_port,
        control_port=control_port,
        allow=tuple(allow or ()),
        install=install,
        insecure=insecure,
    )
    names = site_names(sites)
    create_deployment(folder, plan, names, sites_make_keys)
    _say(f"{folder}/coordinator: {folder}/coordinator/start-superlink.sh starts the SuperLink")
    for name in names:
        _say(f"{folder}/sites/{name}: hand it to {name}, by a way you trust, and to nobody else")
    if insecure:
        _say("INSECURE: no TLS, no keys; for trying out on one machine only")
    else:
        _say(f"{folder}/authority/ca.key: keep it off the coordinator; it signs certificates")


@deploy.command()
def add_site(
    folder: FolderArgument,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    public_key: Annotated[
        Path | None,
        typer.Option(help="The .pub file of a key that the site made itself."),
    ] = None,
    makes_own_key: Annotated[
        bool, typer.Option("--makes-own-key", help="The site will make its key and send the .pub.")
    ] = False,
    debug: job.DebugOption = False,
) -> None:
    """Write the folder of one more site, or take the public key of one that made its own.

    Then coordinator/register-sites.sh tells the running SuperLink.
    """
    from deployment.folder import add_site as add
    from deployment.plan import read_plan

    plan = read_plan(folder)
    site, replaced = add(folder, plan, name, makes_own_key, public_key)
    _say(f"{site}: hand it to {name}, by a way you trust, and to nobody else")
    if replaced:
        _say(f"{name} had another key: it joins with that one until register-sites.sh revokes it")
    if not plan.insecure and not makes_own_key:
        _say(f"{folder}/coordinator/register-sites.sh registers its key")


@deploy.command()
def pack(
    folder: FolderArgument,
    name: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.")],
    run_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The run's configuration, to go with it."),
    ] = None,
    into: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder for the archive.")
    ] = Path(),
    debug: job.DebugOption = False,
) -> None:
    """Pack what one site needs into SITE.tgz, which only you may read.

    Example:
      bouquet deploy pack trial oslo --run-file run.toml
    """
    from deployment.folder import pack_site

    path = pack_site(folder, name, run_file, into)
    _say(f"{path}: hand it to {name} by a way you trust, which unpacks it with tar -xzf; then")
    secret = folder / "sites" / name / "node.key"
    also = f" and {secret}" if secret.exists() else ""
    _say(f"delete {path}{also} here, and {name} deletes the archive: who has the key is {name}")


@deploy.command()
def key(
    site: SiteArgument,
    debug: job.DebugOption = False,
) -> None:
    """Make this site's own key pair; only the public half is for the coordinator."""
    from deployment.node_keys import make_node_key
    from deployment.site_file import read_site

    found = read_site(site)
    if found.insecure:
        raise UsageError(
            f"{site} has no ca.pem: it belongs to an insecure deployment, without keys"
        )
    public = make_node_key(site / "node.key", found.site.name)
    _say(f"{site}/node.key: secret, stays here")
    _say(
        f"{public}: send it to the coordinator, who runs: bouquet deploy add-site DIR "
        f"{found.site.name} --public-key {public.name}"
    )


@deploy.command()
def renew(
    folder: FolderArgument,
    address: Annotated[
        list[str] | None, typer.Option(help="One more DNS name or IP address of the coordinator.")
    ] = None,
    debug: job.DebugOption = False,
) -> None:
    """A new server certificate from the same authority; the sites go on as they are."""
    from deployment.folder import renew_server
    from deployment.plan import read_plan

    path = renew_server(folder, read_plan(folder), address or ())
    _say(f"{path} and its key are new: restart the SuperLink")


@deploy.command(hidden=True)
def register_sites(
    coordinator: Annotated[Path, typer.Argument(metavar="COORDINATOR")],
    link: Annotated[str, typer.Argument(metavar="LINK")],
    debug: job.DebugOption = False,
) -> None:
    """What register-sites.sh does: revoke what counts no longer, then register what is new."""
    from deployment.registration import Flower, Keys
    from deployment.registration import register_sites as register

    if not register(Keys(coordinator / "keys"), Flower(link), _say):
        raise typer.Exit(1)


@deploy.command(hidden=True)
def remove_site(
    coordinator: Annotated[Path, typer.Argument(metavar="COORDINATOR")],
    link: Annotated[str, typer.Argument(metavar="LINK")],
    name: Annotated[str, typer.Argument(metavar="SITE")],
    debug: job.DebugOption = False,
) -> None:
    """What remove-site.sh does: revoke every key that the site ever had."""
    from deployment.registration import Flower, Keys
    from deployment.registration import remove_site as remove

    if not remove(Keys(coordinator / "keys"), Flower(link), name, _say):
        raise typer.Exit(1)


@deploy.command(hidden=True)
def needs_grpc(debug: job.DebugOption = False) -> None:
    """Fail where the installed Flower has no gRPC; start-superlink.sh asks before it starts."""
    from deployment.flower_version import refuse_http

    refuse_http()


@deploy.command()
def site_settings(site: SiteArgument, debug: job.DebugOption = False) -> None:
    """Print what start-supernode.sh takes from site.toml, a line each."""
    from deployment.flower_version import refuse_http
    from deployment.site_file import read_site

    found = read_site(site)
    if not found.insecure:
        refuse_http()
    for line in (found.superlink, found.port, found.node_config, found.trusted_entities):
        typer.echo(line)


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
