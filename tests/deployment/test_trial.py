"""`bouquet deploy try` and `stop` with real processes: TLS, keys, a run of the embedded model."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployment.plan import read_plan
from deployment.processes import MARK, end_all, has_mark, marked, new_mark
from tests.deployment.page import steps
from tools.rehearsal.loopback import Loopback, free_ports, is_free

LONG = "--sites 3"
SMALL = "--ranks 4,2 --rounds 1 --steps 1 --set evaluate.server=false --set data.context=48"


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[Loopback]:
    loopback = Loopback(tmp_path)
    try:
        yield loopback
    finally:
        loopback.run("test ! -f here/trial.toml || bouquet deploy stop here", tmp_path)
        loopback.stop()


def test_a_trial_runs_and_is_ended_whole(loopback: Loopback) -> None:
    folder = loopback.folder
    start, stop = [step.text for step in steps() if step.machines == ("trial",)]
    assert LONG in start
    said = loopback.run(start.replace(LONG, SMALL), folder)
    assert "site-1: up" in said
    assert "site-2: up" in said
    assert "event=round round=1" in said
    assert "the run finished" in said
    assert (folder / "here/coordinator/runs/trial/adapter/adapter_model.safetensors").is_file()
    assert "the adapter is in here/coordinator/runs/trial/adapter" in said

    trial = tomllib.loads((folder / "here/trial.toml").read_text())
    daemons = {trial["processes"][name] for name in ("superlink", "site-1", "site-2")}
    assert daemons <= set(marked(trial["mark"]))
    again = loopback.run(f"bouquet deploy try here {SMALL}", folder, code=2)
    assert "here holds a trial already: bouquet deploy stop here" in again
    assert daemons <= set(marked(trial["mark"])), "a refused command touches nothing"

    loopback.kill_pid(trial["processes"]["superlink"])  # a crash: what it started has no parent
    assert "ended" in loopback.run(stop, folder)
    assert marked(trial["mark"]) == []
    plan = read_plan(folder / "here")
    assert is_free(plan.fleet_port)
    assert is_free(plan.control_port)
    assert "nothing was running" in loopback.run("bouquet deploy stop here", folder)


def test_what_cannot_start_is_told_and_leaves_nothing(loopback: Loopback) -> None:
    folder = loopback.folder
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    assert "full is not empty" in loopback.run("bouquet deploy try full", folder, code=2)
    assert "full is no trial" in loopback.run("bouquet deploy stop full", folder, code=2)
    (port,) = free_ports(1)
    loopback.start("other", f"python -m http.server {port} --bind 127.0.0.1", folder)
    while is_free(port):
        pass
    taken = loopback.run(f"bouquet deploy try here --fleet-port {port}", folder, code=2)
    assert f"port {port} is taken" in taken
    assert not (folder / "here").exists()


def test_only_processes_with_the_mark_are_ended() -> None:
    """A recorded pid that the system gave to another process is not even looked at."""
    mark, other = new_mark(), new_mark()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen(sleep, env={**os.environ, MARK: mark}, start_new_session=True)
    theirs = subprocess.Popen(sleep, env={**os.environ, MARK: other}, start_new_session=True)
    try:
        assert end_all(mark) == 1
        assert ours.wait() != 0
        assert theirs.poll() is None
        assert has_mark(theirs.pid, other)
    finally:
        theirs.kill()
        theirs.wait()
