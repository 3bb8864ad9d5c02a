"""A coordinator and three sites on this machine, set up by what docs/deploy.md says.

Each machine is a folder. What the page cannot know (ports, paths, ranks, a tiny model, few steps)
is replaced here; every command is the page's own.
"""

import json
import shutil
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tomli_w

from deployment.trial import rooms_of_the_bundle
from tests.deployment.page import Step, steps
from tools.rehearsal.loopback import ROOT, Loopback, free_ports
from tools.rehearsal.tiny_models import save_llama

RANKS = {"oslo": 8, "bergen": 4, "tromso": 2}
HOST = "fed.example.org"
SHORT: dict[str, Any] = {
    "rounds": 2,
    "seed": 7,
    "clients": {"min-replies": 2, "timeout-seconds": 240.0},
    "data": {"context": 48},
    "local": {"batch-size": 4, "max-steps": 3, "precision": "float32"},
    "evaluate": {"clients": False},
}


class Federation:
    """The machines, and the page's steps played on them."""

    def __init__(self, folder: Path) -> None:
        self.fleet_port, self.control_port, *ports = free_ports(6)
        self.ports = dict(zip((*RANKS, "stranger"), ports, strict=True))
        self.loopback = Loopback(
            folder,
            BOUQUET_FLEET_PORT=str(self.fleet_port),
            BOUQUET_CONTROL_PORT=str(self.control_port),
        )
        self.model = save_llama(folder / "base-model")
        self.machines = {name: folder / name for name in RANKS}
        self.data = {name: _save_data(folder, name, 20 + 8 * rank) for name, rank in RANKS.items()}
        for machine in self.machines.values():
            machine.mkdir()
        self.project = _copy_project(folder / "bouquet")
        self.machines["coordinator"] = self.project
        self.run_config: dict[str, Any] = {}
        self.outputs: list[str] = []
        self.played: list[Step] = []

    @property
    def run_folder(self) -> Path:
        """Of the run that the page starts."""
        return self.project / "trial" / "coordinator" / "runs" / "trial"

    def play(self, step: Step) -> None:
        """One block of the page, on each of its machines."""
        self.played.append(step)
        if step.machines == ("run.toml",):
            self.run_config = _merged(tomllib.loads(step.text), SHORT)
            (self.project / "run.toml").write_text(tomli_w.dumps(self.run_config))
        elif step.machines == ("site.toml",):
            for name in ("oslo", "bergen"):
                self.write_site(step, name)
        else:
            with ThreadPoolExecutor() as machines:
                list(machines.map(lambda machine: self.play_on(machine, step), step.machines))

    def play_on(self, machine: str, step: Step) -> None:
        """Commands on one machine; a site's are written for the first that they are for."""
        text = step.text.replace(HOST, "localhost").replace(":8000/", f":{self.control_port}/")
        if machine != "coordinator":
            text = text.replace(step.machines[0], machine)
            text = text.replace(":9094/", f":{self.ports[machine]}/")
            self._carry(machine)
        if step.keeps_running:
            self.loopback.start(machine, text.strip(), self.machines[machine])
            sign = "Uvicorn running" if machine == "coordinator" else "SuperNode ID"
            self.loopback.wait_for(machine, sign)
        else:
            self.outputs.append(self.loopback.run(text, self.machines[machine]))
        key = self.machines["tromso"] / "tromso" / "node.key.pub"
        if key.exists():
            shutil.copy(key, self.project / "node.key.pub")
        if machine == "tromso" and "deploy key" in text:
            toml = next(s for s in steps() if s.machines == ("site.toml",))
            self.write_site(toml, "tromso")

    def write_site(self, step: Step, name: str, folder: Path | None = None) -> None:
        """The page's site.toml, with this site's own values."""
        table = tomllib.loads(step.text.replace(HOST, "localhost"))
        table["superlink"] = f"localhost:{self.fleet_port}"
        table["port"] = self.ports[name]
        table["node"] |= {
            "name": name,
            "rank": RANKS.get(name, 2),
            "data-path": str(self.data.get(name, self.data["oslo"])),
            "model-path": str(self.model),
            "device": "cpu",
        }
        folder = folder or self.machines[name] / name
        (folder / "site.toml").write_text(tomli_w.dumps(table))

    def _carry(self, site: str) -> None:
        """The archive that the coordinator packed for this site, by a way that both trust."""
        archive = self.project / f"{site}.tgz"
        if archive.exists():
            shutil.copy(archive, self.machines[site] / archive.name)


def _copy_project(target: Path) -> Path:
    """The project's folder without weights and history: deployments are made inside it."""
    target.mkdir()
    for room in rooms_of_the_bundle():
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / room, target / room, ignore=ignored)
    for file in ("pyproject.toml", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / file, target / file)
    return target


def _save_data(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.jsonl"
    lines = [{"question": f"{name} {k}?", "answer": f"it is {k * k}"} for k in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def _merged(table: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return table | {
        name: _merged(table.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in over.items()
    }
