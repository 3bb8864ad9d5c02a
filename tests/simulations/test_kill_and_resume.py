"""A run that is killed, with SIGKILL, at any moment ends with the bytes of one that was not.

Real processes on a tiny model. In the first the process kills itself at a chosen instruction of
the commit of a round, so that every gap between two writes is hit; in the second it is killed from
outside at arbitrary times.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.rehearsal.tiny_models import save_llama

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
# what is patched -> how the process dies there
GAPS = {
    "while training in round 2": (
        "client.training.train",
        "lambda original: lambda *a, **k: die() if a[4] in seen else original(*a, **k)",
    ),
    "after the log line, before the state": (
        "journal.run_folder.RunFolder.save",
        "lambda original: lambda self, state: die() if state.round == 2 else original(self, state)",
    ),
    "in the middle of writing the log line": (
        "journal.run_folder.RunFolder.append",
        "lambda original: lambda self, record: (torn(self) if record['round'] == 2 "
        "else original(self, record))",
    ),
    "while writing the state": (
        "journal.state.write_durably",
        "lambda original: lambda path, data: (path.write_bytes(data[:99]), die()) "
        "if 'round-0002' in str(path) else original(path, data)",
    ),
    "after the state's rename": (
        "journal.state.flush_folder",
        "lambda original: lambda folder: die() if (folder / 'round-0002').exists() "
        "else original(folder)",
    ),
    "while writing the adapter": (
        "journal.run_folder.write_peft",
        "lambda original: lambda *a: (original(*a), die())",
    ),
}
SCRIPT = """
import importlib, os, signal, sys
import client.app, server.rounds
def die(): os.kill(os.getpid(), signal.SIGKILL)
def torn(folder):
    with (folder.path / "rounds.jsonl").open("a") as log:
        log.write('{"round": 2, "train_lo'); log.flush(); die()
class Seeds:
    def __init__(self): self.count = 0
    def __contains__(self, seed): self.count += 1; return self.count == 3
seen = Seeds()
target, wrap = sys.argv[1:3]
owner, _, name = target.rpartition(".")
try:
    holder = importlib.import_module(owner)
except ModuleNotFoundError:
    module, _, holder = owner.rpartition(".")
    holder = getattr(importlib.import_module(module), holder)
setattr(holder, name, eval(wrap)(getattr(holder, name)))
sys.argv = ["bouquet", *sys.argv[3:]]
from commands.cli import main
main()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("job")
    save_llama(folder / "model")
    lines = [{"prompt": f"what is {k}?", "response": f"it is {k * k}"} for k in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        *("simulate", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")),
        *("--ranks", "4,2", "--rounds", str(ROUNDS), "--steps", "2", "--seed", "11"),
        *("--set", "local.batch-size=4", "--set", "data.context=48", "--set", "lora.dropout=0.1"),
    ]


def start(arguments: list[str], script: list[str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, *(script or ["-m", "bouquet"]), *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err


def outcome(folder: Path) -> tuple[bytes, Any]:
    def timeless(record: Any) -> Any:
        if isinstance(record, dict):
            return {k: timeless(v) for k, v in record.items() if not k.endswith("seconds")}
        return [timeless(item) for item in record] if isinstance(record, list) else record

    lines = (folder / "rounds.jsonl").read_text().splitlines()
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return adapter, [timeless(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start([*job, "--output", str(folder)]), 0)
    adapter, records = outcome(folder)
    assert [record["round"] for record in records] == list(range(ROUNDS + 1))
    return adapter, records


@pytest.mark.parametrize("gap", GAPS)
def test_killed_in_every_gap_of_a_round(
    gap: str, job: list[str], uninterrupted: tuple[bytes, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    finish(start([*job, "--output", str(folder)], ["-c", SCRIPT, *GAPS[gap]]), -signal.SIGKILL)
    assert not (folder / "adapter").exists()
    finish(start(["simulate", "--resume", str(folder)]), 0)
    assert outcome(folder) == uninterrupted


def test_killed_again_and_again_from_outside(
    job: list[str], uninterrupted: tuple[bytes, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*job, "--output", str(folder)]
    for expected_rounds in (1, 3):
        process = start(arguments)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            log = folder / "rounds.jsonl"
            if log.exists() and log.read_bytes().count(b"\n") >= expected_rounds:
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
        arguments = ["simulate", "--resume", str(folder)]
    finish(start(arguments), 0)
    assert outcome(folder) == uninterrupted
