"""A whole deployment on this machine, with TLS and keys: to see it work before there are sites.

DIR/                     as `bouquet deploy init` writes it, and beside it
    app/                 this project's code, from which `flwr run` makes the bundle
    run.toml             what the run's configuration says
    trial.toml           the mark of all processes, and the pids of those started here
    logs/NAME.log        of the SuperLink, of each site and of the run
"""

import json
import os
import shutil
import socket
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tomli_w

import settings
from core.errors import UsageError
from deployment.folder import create_deployment
from deployment.plan import Plan, read_plan
from deployment.processes import Daemons, end_all, new_mark, refuse_without_proc
from settings.keys import Value
from settings.knobs import fold_knobs

LINK = "trial"
RUN = Path("runs", LINK)
"""Of the run's folder below the coordinator's."""
TRIAL_FILE = "trial.toml"
HOME = Path(settings.__file__).resolve().parent.parent
"""The folder of the rooms."""
PATIENCE_SECONDS = 120.0
"""How long a part may take until it is up."""


class Trial:
    """A deployment in `folder` whose parts all run here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.coordinator = self.folder / "coordinator"
        self.run_folder = self.coordinator / RUN
        self._mark = new_mark()
        logs = self.folder / "logs"
        self._daemons = Daemons(self._mark, logs, _environment(len(self._sites())))

    def start(self, say: Callable[[str], None]) -> None:
        """SuperLink, keys, SuperNodes; each is told when it is up."""
        self._daemons.logs.mkdir(exist_ok=True)
        self._write_pids()  # the mark, by which `stop` finds what is cut off from here on
        self._start("superlink", self.coordinator / "start-superlink.sh")
        self._daemons.wait_for("superlink", "Uvicorn running", PATIENCE_SECONDS)
        plan = read_plan(self.folder)
        say(f"superlink: up, sites at {plan.superlink}, flwr at 127.0.0.1:{plan.control_port}")
        self._start("register-sites", self.coordinator / "register-sites.sh")
        self._daemons.finish("register-sites", PATIENCE_SECONDS)
        sites = self._sites()
        for site in sites:
            self._start(site.name, site / "start-supernode.sh")
        for site in sites:
            self._daemons.wait_for(site.name, "SuperNode ID", PATIENCE_SECONDS)
            say(f"{site.name}: up, its key is accepted")

    def run(self) -> Iterator[str]:
        """Start the run; the lines of its log, as they come, until it ends."""
        what = ["run", str(self.folder / "app"), LINK, "--stream"]
        command = [str(self.coordinator / "flwr"), *what, "--run-config"]
        process = self._daemons.start("run", [*command, str(self.folder / "run.toml")], self.folder)
        self._write_pids()
        with (self._daemons.logs / "run.log").open(errors="replace") as log:
            line = ""
            while True:
                ended = process.poll() is not None
                line += log.readline()
                if line.endswith("\n"):
                    yield line.rstrip("\n")
                    line = ""
                elif ended:
                    break
                else:
                    time.sleep(0.1)
        if line:
            yield line

    def _start(self, name: str, script: Path) -> None:
        self._daemons.start(name, [str(script)], self.folder)
        self._write_pids()

    def _write_pids(self) -> None:
        table = {"mark": self._mark, "processes": self._daemons.pids}
        (self.folder / TRIAL_FILE).write_text(tomli_w.dumps(table))

    def _sites(self) -> list[Path]:
        return sorted((self.folder / "sites").iterdir())


def create_trial(
    folder: Path,
    ranks: Sequence[int],
    run_config: Mapping[str, Value],
    fleet_port: int = 0,
    control_port: int = 0,
) -> Trial:
    """Write the deployment of as many sites as there are ranks; port 0: one that is free.

    UsageError where the folder holds something already or a port is taken.
    """
    refuse_without_proc()
    refuse_used(folder)
    ports = open_ports([fleet_port, control_port, *(0 for _ in ranks)])
    plan = Plan(link=LINK, address="localhost", fleet_port=ports[0], control_port=ports[1])
    names = [f"site-{number}" for number in range(1, len(ranks) + 1)]
    if folder.is_dir():
        folder.rmdir()
    create_deployment(folder, plan, names, sites_make_keys=False)
    for number, (name, rank, port) in enumerate(zip(names, ranks, ports[2:], strict=True)):
        node = {
            "name": name,
            "rank": rank,
            "partition-id": number,
            "num-partitions": len(ranks),
            "cache-path": "cache",
        }
        table = {"superlink": plan.superlink, "port": port, "node": node}
        (folder / "sites" / name / "site.toml").write_text(tomli_w.dumps(table))
    _write_app(folder / "app")
    own: dict[str, Value] = {
        "output": str(RUN),
        "resume": True,
        "clients.count": len(ranks),
        "clients.min-replies": len(ranks),
    }
    keys = fold_knobs({**own, **run_config}).items()  # flwr run takes knobs as text alone
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in keys]
    (folder / "run.toml").write_text("".join(lines))
    return Trial(folder)


def stop_trial(folder: Path) -> int:
    """End every process of the trial in this folder, however it came to be. How many there were."""
    refuse_without_proc()
    path = folder / TRIAL_FILE
    try:
        mark = tomllib.loads(path.read_text())["mark"]
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no trial: it has no {TRIAL_FILE}, which bouquet deploy try writes"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return end_all(mark)


def refuse_used(folder: Path) -> None:
    """UsageError where the folder is not new or empty."""
    if (folder / TRIAL_FILE).is_file():
        raise UsageError(
            f"{folder} holds a trial already: bouquet deploy stop {folder} ends it; then delete "
            "the folder or name another"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty: name a folder that does not exist")


def open_ports(wanted: Sequence[int]) -> list[int]:
    """These ports; each 0 becomes one that nobody listens on."""
    listeners = []
    try:
        for port in wanted:
            try:
                listeners.append(socket.create_server(("127.0.0.1", port)))
            except OSError as error:
                raise UsageError(
                    f"port {port} is taken: {error.strerror}. Name another, or none and a free one "
                    "is found"
                ) from error
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def rooms_of_the_bundle() -> list[str]:
    """The folders that `fab-include` of pyproject.toml names: the code that runs at the sites."""
    tables = tomllib.loads((HOME / "pyproject.toml").read_text())
    patterns = tables["tool"]["flwr"]["app"]["fab-include"]
    return [pattern.partition("/")[0] for pattern in patterns if "/" in pattern]


def _write_app(app: Path) -> None:
    """What `flwr run` makes the bundle of; from a checkout and from an installed package alike."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for room in rooms_of_the_bundle():
        shutil.copytree(HOME / room, app / room, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(HOME / name, app / name)


def _environment(sites: int) -> dict[str, str]:
    """Without Flower's own variables; the machine's cores are shared out among the sites."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    binaries = str(Path(sys.executable).parent)
    threads = str(max(1, len(os.sched_getaffinity(0)) // max(1, sites)))
    return (
        {"OMP_NUM_THREADS": threads}
        | own
        | {
            "PATH": f"{binaries}:{own.get('PATH', '')}",
            "BOUQUET_BIN": binaries,
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
    )
