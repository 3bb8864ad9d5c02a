"""A tiny model and a small file of examples, and the command line as a person calls it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations import cli
from tests.tiny_models import save_llama

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"prompt": f"what is {k}?", "response": f"it is {k * k}", "topic": f"t{k % 5}"}
        for k in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def bouquet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run `bouquet ARGUMENTS` in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bouquet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(str(stopped.value.code)), captured.out, captured.err

    return run


@pytest.fixture
def small_job(tiny_model: Path, tiny_data: Path) -> list[str]:
    """A job of a second: two clients, two rounds, two steps, in float32."""
    return [
        *("simulate", "--model", str(tiny_model), "--data", str(tiny_data), "--ranks", "4,2"),
        *("--rounds", "2", "--steps", "2", "--set", "local.batch-size=4"),
        *("--set", "data.context=48", "--set", "local.precision=float32"),
    ]
