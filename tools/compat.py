"""Do the same apps give the same adapter, to the byte, under another version of Flower?

    .venv-compat/bin/python -m tools.compat --pinned .venv/bin/python

`make compat` makes .venv-compat with the newest Flower that the index has, everything that computes
at the versions of constraints.txt. Two jobs are simulated in process by the pinned interpreter, and
then done by the Flower of the interpreter that runs this: two sites in process and as an insecure
deployment of SuperLink and SuperNodes; two parts of one data set in process and by `flwr run` with
Flower's own simulation. Every adapter must have the bytes of the pinned simulation.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from client.app import app as client_app
from deployment.connection_checks import check_connection
from deployment.site_file import read_site
from server.app import app as server_app
from settings.keys import Value, flatten, flatten_tables
from settings.run import run_settings
from simulations.grid import RUN_ID, SERVER_NODE, InProcessGrid
from tools.rehearsal.loopback import ROOT
from tools.rehearsal.simulation_superlink import superlink, tool
from tools.rehearsal.small_federation import SmallFederation
from tools.rehearsal.tiny_models import save_llama

RANKS = {"one": 4, "two": 2}
JOB: dict[str, Any] = {
    "rounds": 2,
    "seed": 7,
    "clients": {"count": len(RANKS), "min-replies": len(RANKS), "timeout-seconds": 240.0},
    "data": {"prompt": "question", "response": "answer", "context": 48},
    "lora": {"rank": ",".join(map(str, RANKS.values()))},
    "local": {"batch-size": 4, "max-steps": 3, "precision": "float32"},
    "evaluate": {"server": False, "clients": True},
}
FILES = ("adapter_model.safetensors", "adapter_config.json")


class Compatibility:
    """The two jobs, and what each way of doing them made."""

    def __init__(self, folder: Path, pinned: Path) -> None:
        self._folder = folder
        self._model = save_llama(folder / "base-model")
        self._differing = 0
        sites = {
            name: {
                "rank": rank,
                "data-path": str(_save_data(folder, name, 20 + 8 * rank)),
                "model-path": str(self._model),
                "device": "cpu",
            }
            for name, rank in RANKS.items()
        }
        parts = {
            **JOB,
            "model": {"path": str(self._model), "device": "cpu"},
            "data": {**JOB["data"], "path": str(_save_data(folder, "all", 60))},
        }
        print(f"Flower {version('flwr')}, against {_flower_of(pinned)} in process")
        for job, config, nodes in (("sites", JOB, sites), ("parts", parts, {})):
            told = {"config": config, "sites": nodes}
            wanted = self._simulate(pinned, f"{job}-pinned", told)
            found = self._simulate(Path(sys.executable), f"{job}-in-process", told)
            self._compare(f"{job}, in process", found, wanted)
            deploy = self._deploy if nodes else self._flower_simulates
            title = "two SuperNodes" if nodes else "flwr run, Flower's simulation"
            self._compare(f"{job}, {title}", deploy(told), wanted)
        if self._differing:
            sys.exit(f"{self._differing} of 4 differ")

    def _simulate(self, python: Path, name: str, told: Mapping[str, Any]) -> Path:
        """In a process of that interpreter; the run's folder."""
        folder = self._folder / name
        folder.mkdir()
        (folder / "told.json").write_text(json.dumps(told))
        command = [str(python), "-m", "tools.compat", "--simulate", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return folder / "run"

    def _deploy(self, told: Mapping[str, Any]) -> Path:
        """SuperLink and SuperNodes of this Flower on the loopback interface, without TLS."""
        folder = self._folder / "deployment"
        folder.mkdir()
        apps = "server.app:app", "client.app:app"
        federation = SmallFederation(folder, *apps, told["sites"], insecure=True)
        try:
            federation.start()
            for finding in check_connection(read_site(federation.site("one"))):
                print(f"    bouquet check: {finding.verdict.value} {finding.subject}: ", end="")
                print(finding.sentence)
            federation.start_run("run", {**told["config"], "output": "runs/compat"})
            if federation.loopback.wait_for_end("run"):
                raise RuntimeError(federation.loopback.all_logs())
        finally:
            federation.loopback.stop()
        return federation.coordinator / "runs" / "compat"

    def _flower_simulates(self, told: Mapping[str, Any]) -> Path:
        """`flwr run` of this project's bundle, its clients played by Flower."""
        folder = self._folder / "flower-simulates"
        config = flatten_tables({**told["config"], "output": str(folder / "run")})
        pairs = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        command = [tool("flwr"), "run", str(ROOT), "--stream", "--run-config", pairs]
        command += ["--federation-config", f"num-supernodes={len(RANKS)}"]
        with superlink(folder / "flower") as environment:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ended.returncode or not (folder / "run" / "adapter").is_dir():
            raise RuntimeError(f"flwr run failed:\n{(ended.stdout + ended.stderr)[-4000:]}")
        return folder / "run"

    def _compare(self, title: str, found: Path, wanted: Path) -> None:
        same = all(_digest(found / "adapter" / f) == _digest(wanted / "adapter" / f) for f in FILES)
        self._differing += not same
        digest = _digest(found / "adapter" / FILES[0])[:16]
        print(f"{title:<38} {'same bytes' if same else 'OTHER BYTES'}  {digest}", flush=True)


def simulate(folder: Path) -> None:
    """Play FOLDER/told.json in this process; the run lies in FOLDER/run."""
    told = json.loads((folder / "told.json").read_text())
    where: dict[str, Value] = {"output": str(folder / "run"), "resume": False}
    config = flatten(run_settings(flatten_tables(told["config"]), where))
    configs = [
        {**node, "name": name, "cache-path": str(folder / "caches" / name)}
        for name, node in told["sites"].items()
    ]
    grid = InProcessGrid(client_app, len(RANKS), config, node_configs=configs or None)
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(config)))


def _flower_of(python: Path) -> str:
    asked = "from importlib.metadata import version; print(version('flwr'))"
    return subprocess.check_output([str(python), "-c", asked], text=True).strip()


def _save_data(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.jsonl"
    lines = [{"question": f"{name} {k}?", "answer": f"it is {k * k}"} for k in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Do it in a folder that is gone afterwards, or in the one named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pinned", type=Path, default=Path(".venv/bin/python"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--simulate", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.simulate:
        simulate(given.simulate)
    elif given.output:
        given.output.mkdir(parents=True)
        Compatibility(given.output.resolve(), given.pinned)
    else:
        with tempfile.TemporaryDirectory() as folder:
            Compatibility(Path(folder), given.pinned)


if __name__ == "__main__":
    main()
