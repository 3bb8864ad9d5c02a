"""Several strategies on the same job: everything else equal, and every end told."""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from journal.results import Run as ReadRun
from journal.run_folder import RunFolder
from journal.state import ServerState
from simulations.compare import choose_names, own_knobs, shared_settings
from strategies.zero_padding import ZeroPadding
from tests.conftest import Run


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> list[ReadRun]:
    """In place of the page: the runs that it would show."""
    shown: list[ReadRun] = []

    def write_report(folder: Path, runs: Sequence[ReadRun]) -> Path:
        shown[:] = runs
        return folder / "report.html"

    module = ModuleType("reports.page")
    module.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reports.page", module)
    return shown


@pytest.fixture
def job(small_job: list[str]) -> list[str]:
    return ["compare", *small_job[1:], "--seeds", "1"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def sent(folder: Path) -> list[int]:
    return [each["bytes_up"] + each["bytes_down"] for each in records(folder)[1:]]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_only_the_strategy_differs(
    bouquet: Run, job: list[str], page: list[ReadRun], tmp_path: Path
) -> None:
    code, out, err = bouquet(*job, "-s", "flora,zero-padding", "--seeds", "2", "--seed", "5")
    assert (code, err) == (0, "")
    folder = tmp_path / "comparisons" / "001"
    for seed in (5, 6):
        one, two = (folder / "runs" / name / f"seed-{seed}" for name in ("flora", "zero-padding"))
        assert adapter(one) != adapter(two)
        first, second = records(one), records(two)
        assert first[0]["held_out_loss"] == second[0]["held_out_loss"]
        for mine, theirs in zip(first[1:], second[1:], strict=True):
            for key in ("client", "rank", "weight", "num_examples", "steps"):
                assert [c[key] for c in mine["clients"]] == [c[key] for c in theirs["clients"]]
        assert [c["tokens"] for c in first[1]["clients"]] == [
            c["tokens"] for c in second[1]["clients"]
        ]
        assert "client_held_out_loss" in first[-1]
    assert [(run.name, run.seed) for run in page] == [
        ("flora", 5),
        ("flora", 6),
        ("zero-padding", 5),
        ("zero-padding", 6),
    ]
    assert "run 4 of 4: zero-padding, seed 6" in out
    assert "±" in out
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        kept = records(folder / "runs" / row["name"] / f"seed-{row['seed']}")[int(row["round"])]
        for key in ("held_out_loss", "train_loss", "aggregation_noise", "bytes_up", "seconds"):
            assert row[key] == (str(kept[key]) if key in kept else "")


def test_a_run_equals_that_of_simulate(bouquet: Run, job: list[str], small_job: list[str]) -> None:
    assert bouquet(*job, "-s", "flora", "-o", "both")[0] == 0
    assert bouquet(*small_job, "--strategy", "flora", "-o", "one")[0] == 0
    assert adapter(Path("both/runs/flora/seed-0")) == adapter(Path("one"))


def test_a_comparison_goes_on_where_it_was_stopped(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = [*job, "-s", "flora,zero-padding"]
    assert bouquet(*job, "-o", "whole")[0] == 0
    save = RunFolder.save

    def stop(self: RunFolder, state: ServerState) -> None:
        if state.round == 2 and "zero-padding" in str(self.path):
            raise KeyboardInterrupt
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        code, out, _ = bouquet(*job)
    assert code == 130
    command = out.partition("go on with: bouquet ")[2].split()
    assert command == [*job, "--output", "comparisons/001"]
    first, second = (
        tmp_path / "comparisons/001/runs" / name / "seed-0" for name in ("flora", "zero-padding")
    )
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(first)}
    code, out, _ = bouquet(*command)
    assert code == 0
    assert "flora, seed 0 is done already" in out
    assert "going on after round 1 of 2" in out
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files(first)} == before
    assert adapter(second) == adapter(tmp_path / "whole/runs/zero-padding/seed-0")
    losses = [each["held_out_loss"] for each in records(second)]
    assert losses == [
        each["held_out_loss"] for each in records(tmp_path / "whole/runs/zero-padding/seed-0")
    ]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(second)}
    assert bouquet(*command)[0] == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files(second)} == before


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_names_and_seeds_can_be_added(bouquet: Run, job: list[str], page: list[ReadRun]) -> None:
    assert bouquet(*job, "-s", "flora", "-o", "it")[0] == 0
    assert bouquet(*job, "-s", "zero-padding", "-o", "it", "--seeds", "2")[0] == 0
    assert [(run.name, run.seed) for run in page] == [
        ("flora", 0),
        ("flora", 1),
        ("zero-padding", 0),
        ("zero-padding", 1),
    ]


def test_a_folder_of_another_configuration_is_refused(bouquet: Run, job: list[str]) -> None:
    assert bouquet(*job, "-s", "flora", "-o", "it")[0] == 0
    code, _, err = bouquet(*job, "-s", "flora", "-o", "it", "--lr", "0.5")
    assert code == 2
    assert "it compares runs with local.learning-rate = 0.0002, and now it is 0.5" in err
    Path("it/comparison.json").write_text("{}")
    code, _, err = bouquet(*job, "-s", "flora", "-o", "it")
    assert code == 2
    assert "it/comparison.json cannot be read" in err


def test_what_is_refused_or_fails_does_not_stop_the_others(
    bouquet: Run,
    job: list[str],
    page: list[ReadRun],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(ZeroPadding, "aggregate", broken)
        code, out, err = bouquet(*job, "-s", "fedavg,zero-padding,flora", "-o", "it")
    assert (code, err) == (0, "")
    table = out.index("\nstrategy ")
    assert "fedavg, seed 0: fedavg averages" in out[table:]
    assert "zero-padding, seed 0: ZeroDivisionError: a bug" in out
    assert "Traceback" in caplog.text
    failures = {run.name: run.failure for run in page}
    assert failures["flora"] is None
    assert "rank 4: client-00; rank 2: client-01" in str(failures["fedavg"])
    kept = json.loads(Path("it/results.json").read_text())
    assert {run["name"]: run["failure"] for run in kept["runs"]} == failures
    assert bouquet(*job, "-s", "zero-padding", "-o", "it")[0] == 0
    assert {run.name: run.failure for run in page}["zero-padding"] is None
    assert len(records(Path("it/runs/zero-padding/seed-0"))) == 3


def test_where_all_fail_the_comparison_failed(bouquet: Run, job: list[str]) -> None:
    code, _, err = bouquet(*job, "-s", "fedavg", "-o", "it")
    assert code == 1
    assert "none of 1 runs could be finished" in err


def test_equal_bytes_give_the_cheaper_method_more_rounds(
    bouquet: Run, job: list[str], page: list[ReadRun]
) -> None:
    job = [*job, "-s", "ideal,fedavg,local", "-o", "it", "--ranks", "2", "-n", "3"]
    assert bouquet(*job, "--rounds", "3", "--equal-bytes")[0] == 0
    ideal, fedavg = (Path(f"it/runs/{name}/seed-0") for name in ("ideal", "fedavg"))
    budget = sum(sent(ideal))
    assert len(sent(ideal)) == 3 < len(sent(fedavg)) <= 12
    assert sum(sent(fedavg)) <= budget < sum(sent(fedavg)) + sent(fedavg)[-1]
    assert len(records(Path("it/runs/local/seed-0"))) == 2
    assert [each["round"] for each in records(fedavg)] == list(range(len(sent(fedavg)) + 1))
    before = {path: path.read_bytes() for path in files(Path("it/runs"))}
    assert bouquet(*job, "--rounds", "3")[0] == 0
    assert {path: path.read_bytes() for path in files(Path("it/runs"))} == before
    assert {run.name: len(run.rounds) - 1 for run in page}["fedavg"] == len(sent(fedavg))


def test_equal_bytes_stopped_in_an_added_round(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = [*job, "-s", "ideal,fedavg", "--ranks", "2", "-n", "3", "--rounds", "3", "--equal-bytes"]
    assert bouquet(*job, "-o", "whole")[0] == 0
    append = RunFolder.append

    def stop(self: RunFolder, record: dict[str, Any]) -> int:
        length = append(self, record)
        if record["round"] == 4:
            raise KeyboardInterrupt
        return length

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        assert bouquet(*job, "-o", "it")[0] == 130
    assert bouquet(*job, "-o", "it")[0] == 0
    whole, it = (Path(name, "runs/fedavg/seed-0") for name in ("whole", "it"))
    assert sent(it) == sent(whole)
    assert len(sent(it)) >= 4
    assert adapter(it) == adapter(whole)
    assert [path.name for path in it.parent.iterdir()] == ["seed-0"]


def test_a_round_that_turns_out_too_dear_is_taken_back(bouquet: Run, job: list[str]) -> None:
    """flora sends nothing down in its first round, and more than before in its second."""
    job = [*job, "-s", "flora,zero-padding", "--rounds", "1"]
    assert bouquet(*job, "-o", "plain")[0] == 0
    code, out, _ = bouquet(*job, "-o", "equal", "--equal-bytes")
    assert code == 0
    assert "flora, seed 0: round 2 would send too much and is taken back" in out
    plain, equal = (Path(name, "runs", "flora", "seed-0") for name in ("plain", "equal"))
    assert sum(sent(plain)) * 2 <= sum(sent(Path("plain/runs/zero-padding/seed-0")))
    assert len(records(equal)) == 2
    assert adapter(equal) == adapter(plain)
    assert {path.name for path in (equal / "state").iterdir()} == {"round-0000", "round-0001"}
    assert [path.name for path in equal.parent.iterdir()] == ["seed-0"]


USAGE = {
    "an unknown strategy": (
        ["--strategies", "flora,zero-pading"],
        "got 'zero-pading'; the nearest is zero-padding",
    ),
    "no strategy": (["--strategies", ""], "--strategies expects names with commas"),
    "no strategies": ([], "Missing option '--strategies'"),
    "no seed": (["-s", "flora", "--seeds", "0"], "0 is not in the range x>=1"),
    "a strategy of one run": (["-s", "flora", "--strategy", "flora"], "No such option"),
    "an unknown key": (["-s", "flora", "--set", "rouds=1"], "unknown configuration key 'rouds'"),
    "no such data": (["-s", "flora", "--data", "nowhere.jsonl"], "there is no file or folder"),
    "a rank above the matrix": (["-s", "flora", "--ranks", "400"], "rank 400 is more than module"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_call_is_one_message_and_exit_code_2(
    name: str, bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    arguments, message = USAGE[name]
    code, _, err = bouquet(*job, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "comparisons").exists()


def test_a_folder_that_holds_something_else(bouquet: Run, job: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    code, _, err = bouquet(*job, "-s", "flora", "-o", "mine")
    assert code == 2
    assert "mine exists and holds no comparison" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_all_are_those_that_take_the_ranks() -> None:
    assert "fedavg" in choose_names("all", [4, 4])
    assert "fedavg" not in choose_names("all", [4, 2])
    assert choose_names("local,flora,local", [4]) == ["local", "flora"]


def test_a_knob_that_no_compared_method_has_is_refused_before_anything_runs(
    bouquet: Run, tmp_path: Path
) -> None:
    job = ("compare", "--strategies", "fedavg,hetlora", "--output", str(tmp_path / "compared"))
    for knob, words in (
        ("strategy.energy=0.5", "strategy.energy is a knob of none of fedavg, hetlora"),
        ("strategy.hetlora.ridge=1", "strategy.hetlora.ridge is a knob of none of hetlora"),
        ("strategy.hetlra.prune=1", "got 'hetlra'; the nearest is hetlora"),
    ):
        code, _, err = bouquet(*job, "--ranks", "4", "--set", knob)
        assert code == 2
        assert words in " ".join(err.split())
    assert not list((tmp_path / "compared").glob("*/rounds.jsonl"))


def test_each_compared_method_takes_the_knobs_that_it_has() -> None:
    layers = [{"strategy.energy": 0.5, "strategy.hetlora.prune": 0.25, "strategy.penalty": 1.0}]
    text = shared_settings(layers).strategy.knobs
    assert {name: own_knobs(text, name) for name in ("flora", "hetlora", "fedavg")} == {
        "flora": "energy=0.5",
        "hetlora": "prune=0.25,penalty=1.0",
        "fedavg": "",
    }
