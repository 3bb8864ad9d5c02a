"""The folders of a deployment: the coordinator's, and one for each site to be handed to it.

DIR/deployment.toml            names and ports
DIR/authority/                 ca.key signs server certificates: it stays where init ran
DIR/coordinator/               what the machine with the SuperLink needs
    ca.pem server.pem server.key keys/NAME.pub
    flwr start-superlink.sh register-sites.sh remove-site.sh environment.sh superlink.service
DIR/sites/NAME/                what this site needs, and no other
    ca.pem node.key node.key.pub site.toml start-supernode.sh environment.sh supernode.service

No file names the folder that it lies in: each may be carried to where it is needed.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from core.errors import UsageError, listing
from deployment.certificates import Certificate, issue_server, make_authority
from deployment.node_keys import check_public_key, make_node_key
from deployment.plan import Plan, check_name, is_address, write_plan
from deployment.private_files import write_private
from deployment.registration import Keys
from deployment.templates import fill, write_filled

INSECURE_NOTICE = (
    'echo "INSECURE: no TLS, no keys. Everything goes in the clear and any process on this machine '
    'may join. For trying out on one machine only." >&2\n'
)
SITE_KEYS = (
    'export BOUQUET_SITE_KEYS="$here/keys"  # a site is called what its key is registered for\n'
)
GRPC_FIRST = "bouquet deploy needs-grpc\n"
OWN_KEY_STEP = (
    "Make your own key: `bouquet deploy key .` and send `node.key.pub`, and nothing else, to the "
    "coordinator."
)
GIVEN_KEY_STEP = (
    "`node.key` was made by the coordinator. A key of your own is better: delete both files, then "
    "`bouquet deploy key .`, and send the new `node.key.pub` to be registered."
)


def create_deployment(
    folder: Path, plan: Plan, sites: Sequence[str], sites_make_keys: bool
) -> None:
    """Write everything. UsageError where the folder exists: nothing in it is ever overwritten."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(
            f"{folder} exists already. Add a site to a deployment with bouquet deploy add-site, or "
            "choose another folder"
        ) from None
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from error
    (folder / ".gitignore").write_text("# Private keys: never in a repository.\n*\n")
    write_plan(folder, plan)
    coordinator = folder / "coordinator"
    (coordinator / "keys").mkdir(parents=True)
    (coordinator / "flower").mkdir(mode=0o700)
    (folder / "sites").mkdir()
    if not plan.insecure:
        authority = make_authority(plan.link)
        (folder / "authority").mkdir(mode=0o700)
        write_private(folder / "authority" / "ca.key", authority.key)
        (folder / "authority" / "ca.pem").write_bytes(authority.certificate)
        (coordinator / "ca.pem").write_bytes(authority.certificate)
        _write_server(folder, plan, authority)
    _write_coordinator(coordinator, plan)
    for name in sites:
        add_site(folder, plan, name, sites_make_keys)


def renew_server(folder: Path, plan: Plan, more_addresses: Sequence[str] = ()) -> Path:
    """A new server certificate from the same authority: sites go on as they are."""
    if plan.insecure:
        raise UsageError(f"{folder} was made with --insecure: it has no certificate to renew")
    try:
        authority = Certificate(
            (folder / "authority" / "ca.pem").read_bytes(),
            (folder / "authority" / "ca.key").read_bytes(),
        )
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read: {error.strerror}. Bring the authority folder back "
            "from where it is kept"
        ) from error
    plan = replace(plan, other_addresses=(*plan.other_addresses, *more_addresses))
    path = _write_server(folder, plan, authority)
    write_plan(folder, plan)
    return path


def add_site(
    folder: Path,
    plan: Plan,
    name: str,
    makes_own_key: bool = False,
    public_key: Path | None = None,
) -> tuple[Path, bool]:
    """Write a site's folder, and its public key to the coordinator's.

    public_key: that of a key which the site made itself. Returns the site's folder, and whether
    another key was in force, which is revoked.
    """
    site, keys = folder / "sites" / check_name(name), Keys(folder / "coordinator" / "keys")
    if public_key is not None:
        check_public_key(public_key)
        keys.refuse_revoked(name, public_key)
    try:
        site.mkdir(parents=True)
    except FileExistsError:
        if public_key is None:
            raise UsageError(f"{site} exists already: choose another name") from None
        return site, keys.accept(name, public_key)  # of a site whose folder was made before
    own_key = makes_own_key or public_key is not None
    values = {
        "NAME": name,
        "SUPERLINK": plan.superlink,
        "FILES": _listed(plan, own_key),
        "KEY_STEP": _key_step(plan, own_key),
        **_site_security(plan),
        **_unit(plan, plan.addresses if all(map(is_address, plan.addresses)) else ()),
    }
    for file, template in {
        "site.toml": "site.toml",
        "environment.sh": "site-environment.sh",
        "start-supernode.sh": "start-supernode.sh",
        "supernode.service": "supernode.service",
        "README.md": "README.md",
    }.items():
        write_filled(site / file, template, values)
    if plan.insecure:
        return site, False
    (site / "ca.pem").write_bytes((folder / "coordinator" / "ca.pem").read_bytes())
    if public_key is None and not makes_own_key:
        public_key = make_node_key(site / "node.key", name)
    replaced = public_key is not None and keys.accept(name, public_key)
    return site, replaced


def _write_server(folder: Path, plan: Plan, authority: Certificate) -> Path:
    server = issue_server(authority, plan.certified)
    path = folder / "coordinator" / "server.pem"
    write_private(path.with_suffix(".key"), server.key)
    path.write_bytes(server.certificate)
    return path


def _write_coordinator(coordinator: Path, plan: Plan) -> None:
    secure = "--ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key \\\n"
    secure += "    --enable-supernode-auth"
    values = {
        "LINK": plan.link,
        **_unit(plan, plan.allow),
        "FLEET_PORT": str(plan.node_port),
        "CONTROL_PORT": str(plan.control_port),
        "BIND": "127.0.0.1" if plan.insecure else "0.0.0.0",
        "NOTICE": INSECURE_NOTICE if plan.insecure else GRPC_FIRST,
        "SECURITY": "--insecure" if plan.insecure else secure,
        "SITE_KEYS": "" if plan.insecure else SITE_KEYS,
        "TRUST": "insecure = true" if plan.insecure else 'root-certificates = "$here/ca.pem"',
    }
    scripts = ["start-superlink.sh", "superlink.service", "flwr"]
    if not plan.insecure:
        scripts += ["register-sites.sh", "remove-site.sh"]
    for file in scripts:
        write_filled(coordinator / file, file, values)
    write_filled(coordinator / "environment.sh", "coordinator-environment.sh", values)


def _unit(plan: Plan, others: Sequence[str]) -> dict[str, str]:
    """Where systemd finds it, whom it may talk to, and what it may do.

    others: addresses beside this machine's own; none: they are not known, and anybody is let pass.
    """
    known = f"IPAddressAllow=localhost {' '.join(others)}\nIPAddressDeny=any\n"
    unknown = (
        "IPAddressAllow=localhost\n# Add addresses to the line above, then: IPAddressDeny=any\n"
    )
    return {
        "INSTALL": plan.install,
        "ADDRESSES": known if others else unknown,
        "HARDENING": fill("hardening.conf", {}),
    }


def _site_security(plan: Plan) -> dict[str, str]:
    secure = '--root-certificates "$here/ca.pem" \\\n'
    secure += '    --auth-supernode-private-key "$here/node.key"'
    return {
        "SECURITY": "--insecure" if plan.insecure else secure,
        "NOTICE": INSECURE_NOTICE if plan.insecure else "",
    }


def _key_step(plan: Plan, own_key: bool) -> str:
    if plan.insecure:
        return "This is the insecure form, for one machine: there is no key."
    return OWN_KEY_STEP if own_key else GIVEN_KEY_STEP


def pack_site(folder: Path, name: str, run_file: Path | None, into: Path) -> Path:
    """What a site needs, as one archive that only its owner may read: NAME.tgz in `into`.

    run_file: the run's configuration, which lies beside the site's folder in it.
    """
    site = folder / "sites" / check_name(name)
    if not site.is_dir():
        here = sorted(path.name for path in (folder / "sites").glob("*"))
        raise UsageError(f"{folder} has no site {name!r}; it has {listing(here)}")
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        if run_file is not None:
            archive.add(run_file, run_file.name, filter=_nobodys)
        archive.add(site, name, filter=_nobodys)
    path = into / f"{name}.tgz"
    write_private(path, packed.getvalue())
    return path


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of users of this machine."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _listed(plan: Plan, own_key: bool) -> str:
    if plan.insecure:
        return ""
    made = "you make it: below" if own_key else "mode 600"
    return (
        "| `ca.pem` | the certificate authority that this site trusts; not secret |\n"
        f"| `node.key` | proves who this site is: secret, {made} |\n"
        "| `node.key.pub` | its public half, which the SuperLink knows |\n"
    )
