"""A deployment of `bouquet deploy init` on this machine, with apps that need no model and no data.

The bundle holds two stub modules; the apps that they name come from this project, which is on every
process's path. So what runs is Flower's own SuperLink, SuperNodes and processes, and nothing that
takes seconds to import.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from settings.keys import Value
from tools.rehearsal.loopback import ROOT, Loopback, free_ports

LINK = "small"


class SmallFederation:
    """A coordinator and sites, each in a folder of its own below `folder`."""

    def __init__(
        self,
        folder: Path,
        serverapp: str,
        clientapp: str,
        sites: Mapping[str, Mapping[str, Value]],
        insecure: bool = False,
        prefix: str = "",
        prefixes: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """serverapp, clientapp: as module:attribute. sites: name -> what its [node] says more.

        prefix: a command by which every daemon is started; prefixes: another for these sites.
        """
        fleet, control, *ports = free_ports(2 + len(sites))
        self.ports = [fleet, control, *ports]
        self.loopback = Loopback(
            folder,
            BOUQUET_FLEET_PORT=str(fleet),
            BOUQUET_CONTROL_PORT=str(control),
            PYTHONDONTWRITEBYTECODE="",
            PYTHONPYCACHEPREFIX=str(folder / "bytecode"),
            **(environment or {}),
        )
        self.project = _stub_project(folder / "project", serverapp, clientapp)
        self.deployment = self.project / LINK
        self.coordinator = self.deployment / "coordinator"
        names = ",".join(sites)
        unsafe = "--insecure" if insecure else ""
        self.sites = list(sites)
        self._insecure = insecure
        self._prefix = prefix
        self._prefixes = prefixes or {}
        self.loopback.run(
            f"bouquet deploy init {LINK} --address localhost --sites {names} {unsafe}",
            self.project,
        )
        for port, (name, node) in zip(ports, sites.items(), strict=True):
            path = self.site(name) / "site.toml"
            table = tomllib.loads(path.read_text()) | {
                "port": port,
                "node": {"name": name, "cache-path": "cache", **node},
            }
            path.write_text(tomli_w.dumps(table))

    def site(self, name: str) -> Path:
        """The folder of a site."""
        return self.deployment / "sites" / name

    def start(self, at_a_time: int = 4) -> None:
        """SuperLink and all SuperNodes; too many at once would only wait for each other."""
        self.start_superlink()
        self.register_sites()
        for begin in range(0, len(self.sites), at_a_time):
            self.start_sites(self.sites[begin : begin + at_a_time])

    def start_superlink(self) -> None:
        """Start it, also anew after it died, and wait until it answers."""
        already = self.count("superlink", "Uvicorn running")
        script = self.coordinator / "start-superlink.sh"
        self.loopback.start("superlink", f"{self._prefix} {script}", self.project)
        self.loopback.wait_for("superlink", "Uvicorn running", already + 1)

    def register_sites(self) -> None:
        """Tell the SuperLink the sites' keys, where there are any."""
        if not self._insecure:
            self.loopback.run(str(self.coordinator / "register-sites.sh"), self.project)

    def start_sites(self, names: Sequence[str], wait: bool = True) -> None:
        """Start these SuperNodes and wait until the SuperLink has let them in."""
        already = {name: self.count(name, "SuperNode ID") for name in names}
        for name in names:
            script = self.site(name) / "start-supernode.sh"
            prefix = self._prefixes.get(name, self._prefix)
            self.loopback.start(name, f"{prefix} {script}", self.project)
        for name in names if wait else ():
            self.loopback.wait_for(name, "SuperNode ID", already[name] + 1)

    def start_run(self, name: str, config: Mapping[str, Any]) -> None:
        """`flwr run` in the background; its output goes to the log of this name."""
        path = self.project / "run.toml"
        path.write_text(tomli_w.dumps(config))
        command = f"{self.coordinator}/flwr run . {LINK} --stream --run-config {path}"
        self.loopback.start(name, f"{self._prefix} {command}", self.project)

    def flwr(self, arguments: str) -> str:
        """What a `flwr` command of the operator says."""
        return self.loopback.run(f"{self.coordinator}/flwr {arguments}", self.project)

    def count(self, name: str, text: str) -> int:
        """How often a started process has written this text."""
        log = self.loopback.logs / f"{name}.log"
        return log.read_text(errors="replace").count(text) if log.exists() else 0


def _stub_project(project: Path, serverapp: str, clientapp: str) -> Path:
    """A folder that `flwr run` takes: this project's configuration, and two stubs for its apps."""
    project.mkdir()
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    config = tables["tool"]["flwr"]["app"]["config"]
    for stub, app in (("stub_server", serverapp), ("stub_client", clientapp)):
        module, _, attribute = app.partition(":")
        text = f"from {module} import {attribute} as found\n\napp = found\n"
        (project / f"{stub}.py").write_text(text)
    flwr = {
        "publisher": "bouquet",
        "fab-include": ["/stub_server.py", "/stub_client.py"],
        "components": {"serverapp": "stub_server:app", "clientapp": "stub_client:app"},
        "config": config,
    }
    written = {
        "project": {
            "name": "small",
            "description": "Stubs for the apps of a deployment on one machine",
            "version": "1.0.0",
            "license": "Apache-2.0",
            "dependencies": tables["project"]["dependencies"][:1],
        },
        "tool": {"flwr": {"app": flwr}},
    }
    (project / "pyproject.toml").write_text(tomli_w.dumps(written))
    return project
