"""bouquet status: read from a run's folder, also while a line is being written."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import UsageError
from deployment.status import read_status
from server.run_folder import RunFolder
from settings.keys import Value
from settings.run import run_settings
from simulations.cli import cli


def client(name: str, seconds: float = 2.0) -> dict[str, Any]:
    return {
        "client": name,
        "rank": 4,
        "num_examples": 30,
        "train_seconds": seconds,
        "bytes_up": 1000,
        "bytes_down": 500,
    }


def round_line(number: int, took_part: list[str], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "round": number,
        "train_loss": 2.5,
        "bytes_up": 1000 * len(took_part),
        "bytes_down": 500 * len(took_part),
        "seconds": 12.0,
        "clients": [client(name) for name in took_part],
        "failures": [{"client": name, "reason": reason} for name, reason in failed.items()],
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    values: dict[str, Value] = {"rounds": 3, "output": str(tmp_path / "run")}
    folder = RunFolder(tmp_path / "run")
    folder.create(run_settings(values))
    folder.append({"round": 0})
    folder.append(round_line(1, ["bergen", "oslo"], {"tromso": "no reply within 60 s"}))
    folder.append(round_line(2, ["bergen", "oslo", "tromso"], {}))
    return folder


def test_who_took_part_and_who_failed(run: RunFolder) -> None:
    found = read_status(run.path)
    assert (found.done, found.wanted, found.finished) == (2, 3, False)
    bergen, oslo, tromso = found.sites()
    assert (bergen.site, oslo.site, tromso.site) == ("bergen", "oslo", "tromso")
    assert (oslo.rounds, oslo.failures, oslo.train_seconds) == ([1, 2], [], 4.0)
    assert (oslo.bytes_up, oslo.bytes_down) == (2000, 1000)
    assert (tromso.rounds, tromso.failures) == ([2], [(1, "no reply within 60 s")])
    assert "waiting for round 3 of 3" in found.next_step()


def test_a_line_that_is_being_written_is_left_out(run: RunFolder) -> None:
    with (run.path / "rounds.jsonl").open("a") as log:
        log.write('{"round": 3, "train')
    assert read_status(run.path).done == 2


def test_a_run_is_finished_when_its_adapter_is_there(run: RunFolder) -> None:
    run.append(round_line(3, ["oslo"], {}))
    assert not read_status(run.path).finished
    (run.path / "adapter").mkdir()
    assert read_status(run.path).finished
    assert "finished: the adapter is in" in read_status(run.path).next_step()


def test_a_method_with_personal_models_names_no_adapter_and_one_kind_of_loss(
    tmp_path: Path,
) -> None:
    values: dict[str, Value] = {"rounds": 1, "strategy.name": "fedsa-lora"}
    folder = RunFolder(tmp_path / "run")
    folder.create(run_settings(values, {"output": str(folder.path)}))
    folder.append({"round": 0, "held_out_loss": 9.25, "client_held_out_loss": 8.5})
    assert read_status(folder.path).own_losses
    folder.append({**round_line(1, ["oslo"], {}), "client_held_out_loss": 7.5})
    words = read_status(folder.path).next_step()
    assert "fedsa-lora has a model for each client, and no global adapter" in words
    assert "/adapter" not in words
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(folder.path)]).output
    assert "1 of 1 round\n" in said
    assert all(words in said for words in ("clients' loss", "8.5000", "7.5000"))
    assert not any(words in said for words in ("held-out loss", "9.2500"))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create(run_settings({"output": str(tmp_path / "run")}))
    found = read_status(tmp_path / "run")
    assert (found.done, found.records, found.sites()) == (0, [], [])
    assert "waiting for the first answers" in found.next_step()


def test_the_command(run: RunFolder) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["status", str(run.path)])
    assert said.exit_code == 0, said.output
    assert "2 of 3 rounds" in said.output
    assert "round 1: tromso failed: no reply within 60 s" in said.output


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder of a run"):
        read_status(tmp_path)
    (tmp_path / "config.toml").write_text("rounds = 1\n[strategy]\nname = 'flora'\n")
    (tmp_path / "rounds.jsonl").write_text(json.dumps({"round": 0})[:-3] + "\n")
    with pytest.raises(UsageError, match=r"rounds.jsonl is damaged"):
        read_status(tmp_path)
