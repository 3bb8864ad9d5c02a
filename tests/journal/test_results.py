"""What is taken from run folders, and what is written from it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import UsageError
from journal.results import REFERENCE_KEY, Run, final_metrics, read_run, summary_rows, write_results
from journal.run_folder import RunFolder
from settings.run import run_settings


def record(number: int, **values: Any) -> dict[str, Any]:
    return {"round": number, **values}


def run_of(name: str, seed: int, *rounds: dict[str, Any], **values: Any) -> Run:
    return Run(name, seed, Path("runs", name, f"seed-{seed}"), {"seed": seed}, {}, rounds, **values)


def written(folder: Path, *rounds: dict[str, Any], **values: Any) -> Path:
    run = RunFolder(folder)
    run.create(run_settings({"strategy.name": "fedavg", "seed": 4, **values}))
    for each in rounds:
        run.append(each)
    return folder


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", record(0, held_out_loss=3.0), record(1, held_out_loss=2.0))
    run = read_run(folder)
    assert (run.name, run.seed, run.failure) == ("fedavg", 4, None)
    assert run.config["local.batch-size"] == run_settings().local.batch_size
    assert set(run.versions) >= {"python", "numpy"}
    assert [each["held_out_loss"] for each in run.rounds] == [3.0, 2.0]


def test_a_reference_says_so_in_its_config(tmp_path: Path) -> None:
    config = written(tmp_path / "run") / "config.toml"
    config.write_text(f'{REFERENCE_KEY} = "local"\n\n{config.read_text()}')
    assert read_run(config.parent).name == "local"


def test_a_run_that_was_killed_in_a_line_is_read_up_to_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", record(0))
    with (folder / "rounds.jsonl").open("a") as log:
        log.write('{"round": 1, "train_l')
    assert [each["round"] for each in read_run(folder).rounds] == [0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.toml in .*runs/flora-001"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("a = [")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("rounds = 3")
    with pytest.raises(UsageError, match="names no strategy"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text('strategy.name = "flora"')
    (tmp_path / "rounds.jsonl").write_text("no json\n")
    with pytest.raises(UsageError, match="damaged: line 1 is not JSON"):
        read_run(tmp_path)


def test_final_metrics_are_the_last_values_and_the_sums() -> None:
    clients = [
        {"client": "client-00", "loss": 1.0, "accuracy": 0.9, "examples": 10},
        {"client": "client-01", "loss": 3.0, "accuracy": 0.5, "examples": 30},
    ]
    run = run_of(
        "flora",
        0,
        record(0, held_out_loss=5.0, bytes_up=99),
        record(1, held_out_loss=4.0, held_out_accuracy=0.5, bytes_up=10, bytes_down=0, seconds=1.0),
        record(2, client_held_out=clients, bytes_up=10, bytes_down=5, seconds=2.0),
    )
    final = final_metrics(run)
    assert (final["held_out_loss"], final["held_out_accuracy"]) == (4.0, 0.5)
    assert (final["bytes_up"], final["bytes_down"], final["bytes"]) == (20, 5, 25)
    assert (final["seconds"], final["rounds"]) == (3.0, 2)
    assert (final["worst_client_loss"], final["worst_client_accuracy"]) == (3.0, 0.5)
    assert (final["client_loss_mean"], final["client_loss_deviation"]) == (2.0, 1.0)
    assert "held_out_macro_f1" not in final
    assert final_metrics(run_of("flora", 0))["rounds"] == 0


def test_the_summary_is_over_whole_runs_and_the_best_comes_first() -> None:
    def ended(name: str, seed: int, loss: float, **values: Any) -> Run:
        return run_of(name, seed, record(0), record(1, held_out_loss=loss), **values)

    own = record(1, client_held_out=[{"client": "a", "loss": 0.5}], client_held_out_loss=0.5)
    rows = summary_rows(
        [
            *(ended("fedavg", seed, loss) for seed, loss in enumerate((3.0, 5.0))),
            run_of("rbla", 0, failure="refused"),
            *(ended("flora", seed, loss) for seed, loss in enumerate((1.0, 2.0, 3.0))),
            ended("flora", 3, 99.0, failure="the disk is full"),
            run_of("fedsa-lora", 0, own),
        ]
    )
    assert [row.name for row in rows] == ["flora", "fedavg", "fedsa-lora", "rbla"]
    loss = rows[0].metrics["held_out_loss"]
    assert (loss.mean, loss.deviation, loss.least, loss.most) == (2.0, 1.0, 1.0, 3.0)
    assert rows[0].seeds == (0, 1, 2)
    assert rows[0].failures == {3: "the disk is full"}
    assert rows[3].metrics == {}
    assert rows[2].metrics["client_loss_mean"].deviation == 0.0


def test_the_mean_change_is_over_rounds_and_missing_where_nobody_knows_it() -> None:
    run = run_of(
        "flora",
        0,
        record(0),
        record(1, mean_change_norm=4.0),
        record(2, mean_change_norm=2.0, aggregation_noise=None),
    )
    assert final_metrics(run)["mean_change_norm"] == 3.0
    unknown = final_metrics(run_of("fedsa-lora", 0, record(1, mean_change_norm=None)))
    assert "mean_change_norm" not in unknown


def test_a_folder_of_an_earlier_bouquet_is_read(tmp_path: Path) -> None:
    clients = [{"client": "a", "delta_norm": 3.0}, {"client": "b", "delta_norm": 5.0}]
    old = {"aggregation_noise": 0.1, "increment_norm": 9.0, "clients": clients}
    folder = written(tmp_path / "old", record(0), record(1, **old))
    run = read_run(folder)
    assert run.noise_as_before
    assert [client["change_norm"] for client in run.rounds[1]["clients"]] == [3.0, 5.0]
    assert run.rounds[1]["mean_change_norm"] == 4.0
    assert "ideal_change_norm" not in run.rounds[1]  # another number, of all that was trained
    still = written(tmp_path / "still", record(1, **{**old, "increment_norm": 0.0}))
    assert read_run(still).rounds[0]["ideal_change_norm"] == 0.0
    new = {"aggregation_noise": 0.1, "noise_relative_to_model": 0.05}
    assert not read_run(written(tmp_path / "new", record(1, **new))).noise_as_before


def test_accuracy_decides_where_there_is_one() -> None:
    rows = summary_rows(
        [
            run_of("flora", 0, record(1, held_out_loss=1.0, held_out_accuracy=0.6)),
            run_of("fedavg", 0, record(1, held_out_loss=2.0, held_out_accuracy=0.7)),
            run_of("fedsa-lora", 0, record(1, client_held_out=[{"client": "a", "accuracy": 0.9}])),
        ]
    )
    assert [row.name for row in rows] == ["fedavg", "flora", "fedsa-lora"]


def test_the_files_hold_the_numbers_of_every_round(tmp_path: Path) -> None:
    runs = [
        run_of(
            name,
            seed,
            record(0, held_out_loss=3.25),
            record(1, held_out_loss=0.1 + seed, bytes_up=3, bytes_down=1, seconds=0.5),
            record(2, train_loss=1.5, bytes_up=3, bytes_down=2, seconds=0.25),
        )
        for name in ("flora", "fedavg")
        for seed in (0, 1)
    ]
    write_results(tmp_path, [*runs, run_of("rbla", 0, failure="refused")])
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert len(rows) == 4 * 3
    for row, run in zip(rows[::3], runs, strict=True):
        assert (row["name"], row["seed"], row["round"]) == (run.name, str(run.seed), "0")
        assert (row["held_out_loss"], row["train_loss"]) == ("3.25", "")
    assert float(rows[4]["held_out_loss"]) == 1.1
    assert [row["cumulative_bytes_down"] for row in rows[:3]] == ["0", "1", "3"]
    assert [float(row["cumulative_seconds"]) for row in rows[:3]] == [0.0, 0.5, 0.75]
    document = json.loads((tmp_path / "results.json").read_text())
    assert [run["failure"] for run in document["runs"]] == [None] * 4 + ["refused"]
    assert document["runs"][1]["config"] == {"seed": 1}
    assert document["runs"][0]["final"]["bytes"] == 9
    assert document["runs"][0]["rounds"][2]["cumulative_bytes_up"] == 6


def test_what_all_runs_share_is_said_once(tmp_path: Path) -> None:
    runs = [
        Run(
            "flora",
            seed,
            tmp_path / "runs" / str(seed),
            {"seed": seed, "rounds": 3},
            {"a": "1"},
            [],
        )
        for seed in (0, 1)
    ]
    write_results(tmp_path, runs)
    document = json.loads((tmp_path / "results.json").read_text())
    assert (document["config"], document["versions"]) == ({"rounds": 3}, {"a": "1"})
    assert [run["folder"] for run in document["runs"]] == ["runs/0", "runs/1"]
