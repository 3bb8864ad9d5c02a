"""A site's site.toml: where the SuperLink is, and the node config that the site decides."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import UsageError
from settings.keys import Value, as_list
from settings.paths import absolute_path, absolute_paths
from settings.run import EMBEDDED
from settings.site import KNOWN, Site, parse_site

SITE_FILE = "site.toml"
PATHS = ("data-path", "evaluation-path", "model-path", "cache-path")
LISTS = ("data-path", "evaluation-path")


@dataclass(frozen=True)
class SiteFile:
    """What site.toml says, with paths made absolute."""

    folder: Path
    superlink: str
    port: int
    node: Mapping[str, Value]
    trusted_entities: str = ""
    """File for `flower-supernode --trusted-entities`: only apps signed by one of these run here."""

    @property
    def site(self) -> Site:
        """The same as the ClientApp will see it."""
        return parse_site(self.node)

    @property
    def insecure(self) -> bool:
        """Whether the folder was made by init --insecure: it has no authority to trust."""
        return not (self.folder / "ca.pem").exists()

    @property
    def node_config(self) -> str:
        """For `flower-supernode --node-config`."""
        return " ".join(f"{name}={_quoted(name, value)}" for name, value in self.node.items())


def read_site(folder: Path) -> SiteFile:
    """Read FOLDER/site.toml; UsageError for whatever SuperNode or ClientApp could not use."""
    path = folder / SITE_FILE
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no site's folder: it has no {SITE_FILE}. bouquet deploy init writes one "
            "for each site into sites/"
        ) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if odd := set(table) - {"superlink", "port", "trusted-entities", "node"}:
        raise UsageError(
            f"{path}: {min(odd)!r} is not known here; expected superlink, port, trusted-entities "
            f"and the table [node] with {', '.join(KNOWN)}"
        )
    superlink, port, node = (table.get(name) for name in ("superlink", "port", "node"))
    if not isinstance(superlink, str) or not superlink.rpartition(":")[2].isdigit():
        raise UsageError(f'{path}: superlink must be "HOST:PORT"; got {superlink!r}')
    if type(port) is not int or not 0 < port < 65536:
        raise UsageError(f"{path}: port must be a number from 1 to 65535; got {port!r}")
    trusted = table.get("trusted-entities", "")
    trusted = absolute_path(trusted, folder.resolve()) if isinstance(trusted, str) else trusted
    if trusted != "" and not (isinstance(trusted, str) and Path(trusted).is_file()):
        raise UsageError(f"{path}: trusted-entities must name a file of keys; got {trusted!r}")
    if not isinstance(node, dict):
        raise UsageError(f"{path} needs a table [node] with at least name and data-path")
    here = folder.resolve()
    node = {n: as_list(v) if n in LISTS and isinstance(v, list) else v for n, v in node.items()}
    values = {
        name: _absolute(here, name, value) if name in PATHS and isinstance(value, str) else value
        for name, value in node.items()
    }
    try:
        parse_site(values)
    except UsageError as error:
        raise UsageError(f"{path}, [node]: {error}") from error
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise UsageError(f"{path}, [node]: {name} must be a number or text")
    return SiteFile(here, superlink, port, values, trusted)


def _absolute(folder: Path, name: str, value: str) -> str:
    """Relative paths lie in the site's folder; data may lie in several."""
    if value in ("", EMBEDDED):
        return value
    return (absolute_paths if name in LISTS else absolute_path)(value, folder)


def _quoted(name: str, value: Value) -> str:
    if not isinstance(value, str):
        return str(value)
    if "'" in value or "\n" in value:
        raise UsageError(
            f"{name} = {value!r}: Flower takes no ' and no line break in a node config"
        )
    return f"'{value}'"
