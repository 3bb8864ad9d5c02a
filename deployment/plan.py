"""What a deployment consists of: kept in DIR/deployment.toml, so that sites can be added later."""

import ipaddress
import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w

from core.errors import UsageError
from deployment.certificates import general_name
from deployment.flower_version import speaks_grpc
from settings.site import NAME

PLAN_FILE = "deployment.toml"
LOOPBACK = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Plan:
    """One federation. Nothing in it is secret."""

    link: str
    """What the SuperLink is called in `flwr run . LINK`."""
    address: str
    """The name or IP address under which sites reach the coordinator."""
    other_addresses: tuple[str, ...] = ()
    """Further ones that the server's certificate holds."""
    fleet_port: int = 9092
    """Where SuperNodes connect."""
    control_port: int = 8000
    """Where the operator's `flwr` connects; on the loopback interface only."""
    allow: tuple[str, ...] = ()
    """Addresses and networks of sites, for the SuperLink's unit; empty: not known."""
    install: str = "/opt/bouquet"
    """Where systemd units expect the folder of a machine, and venv/bin with the commands."""
    insecure: bool = False
    """Without TLS and keys, all on one machine."""

    def __post_init__(self) -> None:
        check_name(self.link)
        for address in (self.address, *self.other_addresses):
            general_name(address)
        if self.insecure and not is_loopback(self.address):
            raise UsageError(
                f"--insecure sends everything in the clear and lets anyone join: it is for one "
                f"machine, --address localhost. For {self.address}, leave it out"
            )
        for network in self.allow:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise UsageError(f"--allow takes addresses and networks: {error}") from None
        if not re.fullmatch(r"(/[\w.@-]+)+", self.install):
            raise UsageError(
                f"--install {self.install} must be an absolute path without spaces, such as "
                "/opt/bouquet"
            )
        if self.fleet_port == self.control_port:
            raise UsageError("--fleet-port and --control-port must differ")

    @property
    def superlink(self) -> str:
        """The address that SuperNodes connect to."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.node_port}"

    @property
    def node_port(self) -> int:
        """The port that SuperNodes connect to: without gRPC it is the operator's own."""
        return self.control_port if self.insecure and not speaks_grpc() else self.fleet_port

    @property
    def addresses(self) -> tuple[str, ...]:
        """Under which sites reach the coordinator."""
        return (self.address, *self.other_addresses)

    @property
    def certified(self) -> tuple[str, ...]:
        """Every name in the server's certificate; the operator's flwr comes over the loopback."""
        return tuple(dict.fromkeys((self.address, *self.other_addresses, *LOOPBACK)))


def is_address(text: str) -> bool:
    """Whether this is an IP address, and no name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether the address cannot leave this machine."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_name(name: str) -> str:
    """UsageError for a name that could not be a folder's or a systemd unit's."""
    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} is no name for a site or a deployment: up to 40 lower-case letters, digits "
            "and hyphens, such as oslo or site-2"
        )
    return name


def write_plan(folder: Path, plan: Plan) -> None:
    """Write DIR/deployment.toml."""
    table = {name.replace("_", "-"): value for name, value in asdict(plan).items()}
    table |= {"other-addresses": list(plan.other_addresses), "allow": list(plan.allow)}
    (folder / PLAN_FILE).write_text(tomli_w.dumps(table))


def read_plan(folder: Path) -> Plan:
    """The plan of the deployment in this folder; UsageError where there is none."""
    path = folder / PLAN_FILE
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no deployment: it has no {PLAN_FILE}. Begin one with: "
            f"bouquet deploy init {folder} --address HOST --sites NAME,NAME"
        ) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in table.items()}
    given |= {name: tuple(given.get(name, ())) for name in ("other_addresses", "allow")}
    known = {field.name for field in fields(Plan)}
    if odd := set(given) - known or {"link", "address"} - set(given):
        raise UsageError(f"{path} has not the keys that init wrote: {', '.join(sorted(odd))}")
    return Plan(**given)


def site_names(text: str) -> Sequence[str]:
    """Names with commas -> each once, checked.

    >>> site_names("oslo, bergen")
    ['oslo', 'bergen']
    """
    names = [check_name(part.strip()) for part in text.split(",") if part.strip()]
    if len(set(names)) < len(names):
        raise UsageError(f"--sites names one site twice: {text}")
    return names
