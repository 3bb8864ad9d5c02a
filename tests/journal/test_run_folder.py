"""A run's folder: what an operator is told to do, by who runs it."""

from pathlib import Path

import pytest
from rich.console import Console

from commands.comparison_display import ComparisonDisplay
from commands.display import Display
from core.errors import BouquetError
from journal.results import REFERENCE_KEY, read_run
from journal.run_folder import RunFolder, read_config
from server.progress import LogObserver, observe_run
from settings.run import run_settings


def broken(folder: Path) -> RunFolder:
    """A run whose log cannot be written."""
    run = RunFolder(folder)
    run.create(run_settings())
    (folder / "rounds.jsonl").mkdir()
    return run


def advice(run: RunFolder) -> str:
    with pytest.raises(BouquetError, match=r"rounds\.jsonl could not be written") as caught:
        run.append({"round": 0})
    return str(caught.value)


def test_a_coordinator_is_told_of_flower_and_not_of_a_simulation(tmp_path: Path) -> None:
    run = broken(tmp_path / "trial")
    for said in (advice(run), watched_by(LogObserver(), run)):
        assert f"flwr run command again: with resume=true and output={run.path}" in said
        assert "simulate" not in said


def watched_by(observer: Display | ComparisonDisplay | LogObserver, run: RunFolder) -> str:
    with observe_run(observer):
        return advice(run)


def test_whoever_simulates_is_told_the_command_to_paste(tmp_path: Path) -> None:
    run = broken(tmp_path / "a run")
    said = watched_by(Display(Console()), run)
    assert said.endswith(f"go on with: bouquet simulate --resume '{run.path}'")
    said = watched_by(ComparisonDisplay(Console(), 1, 1), run)
    assert "same bouquet compare command again" in said
    assert "flwr" not in said


def test_what_a_run_is_beside_its_settings_stands_above_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "reference")
    run.create(run_settings({"seed": 3}), head={REFERENCE_KEY: "local"})
    assert read_run(run.path).name == "local"
    assert read_config(run.path / "config.toml")["seed"] == 3
