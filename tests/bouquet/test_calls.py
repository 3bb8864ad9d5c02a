"""`bouquet.simulate`, `compare` and `open`: what the command does, as values."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bouquet
from bouquet.keywords import layer_of
from commands.cli import cli
from core.errors import UsageError

SMALL: dict[str, Any] = {
    "rounds": 1,
    "steps": 1,
    "ranks": [2, 2],
    "data": {"max_examples": 100},
    "evaluate": {"max_examples": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(scope="module")
def run(folder: Path) -> bouquet.Run:
    return bouquet.simulate("flora", output=folder / "run", progress=False, **SMALL)


@pytest.fixture(scope="module")
def comparison(folder: Path) -> bouquet.Comparison:
    return bouquet.compare(
        ["flora", "fedavg", "local"], seeds=2, output=folder / "all", progress=False, **SMALL
    )


def test_a_run_is_that_of_the_command(run: bouquet.Run, tmp_path: Path) -> None:
    keys = ["data.max-examples=100", "evaluate.max-examples=8"]
    options = [part for key in keys for part in ("--set", key)]
    command = ["simulate", "-s", "flora", "--rounds", "1", "--steps", "1", "--ranks", "2,2"]
    command += ["--output", str(tmp_path / "run")]
    CliRunner().invoke(cli, [*command, *options], catch_exceptions=False)
    weights = "adapter/adapter_model.safetensors"
    assert (run.folder / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_rounds_are_a_table_of_what_was_recorded(run: bouquet.Run) -> None:
    lines = (run.folder / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert list(run.rounds.index) == [0, 1]
    assert run.rounds.loc[1, "held_out_loss"] == last["held_out_loss"]
    assert list(run.clients["client"]) == ["client-00", "client-01"]
    assert run.records[-1] == last
    assert run.keys["lora.rank"] == "2,2"
    assert repr(run) == (
        f"<Run flora in {run.folder}: 1 rounds, held-out loss {last['held_out_loss']:.4f}>"
    )


def test_the_model_of_a_run_is_the_one_that_was_evaluated(run: bouquet.Run) -> None:
    from journal.run_folder import read_config
    from models.tuned_model import resident_model
    from settings.run import run_settings
    from tasks.partition import global_held_out

    settings = run_settings(read_config(run.folder / "config.toml"))
    test = global_held_out(settings.data, 2, settings.seed, 8, settings.task)
    encoded = resident_model(settings.model, settings.lora).encode(test, settings.data)
    model: Any = run.model("cpu")
    import torch

    loss = tokens = 0.0
    for example in encoded.examples:
        ids = torch.as_tensor(example.ids)[None].long()
        labels = ids.clone()
        labels[0, : example.loss_from] = -100
        count = int((labels[0, 1:] != -100).sum())
        loss += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    assert loss / tokens == pytest.approx(run.rounds.loc[1, "held_out_loss"], rel=1e-5)


def test_figures_are_matplotlibs(run: bouquet.Run, tmp_path: Path) -> None:
    run.plot().savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "bytes" in run.figures
    with pytest.raises(UsageError, match=r"no figure 'byte'; the nearest is 'bytes'"):
        run.plot("byte")


def test_a_run_goes_on_from_python(run: bouquet.Run, folder: Path) -> None:
    begun = bouquet.simulate("flora", output=folder / "more", progress=False, **SMALL)
    again = bouquet.simulate(resume=begun.folder, rounds=2, progress=False)
    assert list(again.rounds.index) == [0, 1, 2]
    with pytest.raises(UsageError, match="resume names the folder"):
        bouquet.simulate(resume=begun.folder, output="elsewhere")


def test_a_comparison_is_a_table_with_a_row_for_each_strategy(
    comparison: bouquet.Comparison,
) -> None:
    table = comparison.table
    assert set(table.index) == {"flora", "fedavg", "local"}
    assert list(table["seeds"]) == [2, 2, 2]
    finals = [run.rounds["held_out_loss"].iloc[-1] for run in comparison.runs[:2]]
    assert table.loc["flora", "held_out_loss"] == pytest.approx(sum(finals) / 2)
    assert len(comparison.rounds) == 12
    assert comparison.report.name == "report.html"
    assert "<svg" in comparison.report.read_text()
    assert "loss-bytes" in comparison.figures


def test_open_tells_runs_from_comparisons(
    run: bouquet.Run, comparison: bouquet.Comparison, tmp_path: Path
) -> None:
    assert isinstance(bouquet.open(run.folder), bouquet.Run)
    assert isinstance(bouquet.open(str(comparison.folder)), bouquet.Comparison)
    with pytest.raises(UsageError, match=r"there is no config\.toml in"):
        bouquet.open(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        bouquet.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"local": {"lerning_rate": 1.0}}, "'local.lerning-rate'; the nearest known key is local"),
        ({"epoch": 2}, "unknown configuration key 'epoch'; the nearest known key is local.epochs"),
        ({"rounds": 0}, "rounds must be a whole number, at least 1; got 0"),
        ({"data": object()}, "data must be text, a number, .*; got object"),
        ({"ranks": [4, "x"]}, "expected whole numbers of at least 1"),
    ],
)
def test_a_mistake_is_an_exception_with_the_words_of_the_command(
    keywords: dict[str, Any], words: str
) -> None:
    with pytest.raises(bouquet.UsageError, match=words):
        bouquet.simulate(progress=False, **keywords)


def test_progress_goes_to_the_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bouquet.simulate("flora", output=tmp_path / "run", **SMALL)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()[-2:]] == ["base", "1"]


def test_what_keywords_mean() -> None:
    assert layer_of({"data": ["a.jsonl", Path("b, c.jsonl")], "clients": {"min_replies": 2}}) == {
        "data.path": '["a.jsonl", "b, c.jsonl"]',
        "clients.min-replies": 2,
    }
    assert layer_of({"ranks": 8, "clients": 3}) == {"lora.rank": "8", "clients.count": 3}
    assert layer_of({"data": None}) == {}


def test_without_pandas_a_table_says_what_to_install(
    run: bouquet.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(bouquet.BouquetError, match=r"pip install 'bouquet\[notebook\]'"):
        _ = run.rounds


def test_a_call_leaves_the_process_as_it_found_it(run: bouquet.Run) -> None:
    import os

    import torch
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_progress_bar()
    random, environment = torch.get_rng_state(), dict(os.environ)
    try:
        run.model("cpu")
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
        assert torch.equal(torch.get_rng_state(), random)
        assert dict(os.environ) in (
            environment,
            {n: v for n, v in environment.items() if n != "OPENBLAS_NUM_THREADS"},
        )
    finally:
        transformers.logging.set_verbosity(before)


def test_calls_from_several_threads_wait_for_each_other(run: bouquet.Run) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: len(bouquet.open(run.folder).records), range(40)))
    assert found == [2] * 40
