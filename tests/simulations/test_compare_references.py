"""The references: everyone's data in one place, and each client alone."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adapters.adapter import draw
from client.training import plan_steps, train
from journal.results import read_run
from settings.keys import flatten
from settings.run import RunSettings, run_settings
from settings.seeds import derive_seed
from simulations.local import train_alone
from simulations.references import open_bench, run_reference
from tests.conftest import Run
from tools.rehearsal.tiny_models import save_bert


@pytest.fixture
def settings(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> RunSettings:
    return run_settings(
        {
            "model.path": str(tiny_model),
            "model.device": "cpu",
            "data.path": str(tiny_data),
            "data.context": 48,
            "clients.count": 2,
            "lora.rank": "4,2",
            "lora.dropout": 0.1,
            "local.batch-size": 4,
            "local.max-steps": 2,
            "local.precision": "float32",
            "rounds": 2,
            "seed": 3,
            "evaluate.clients": True,
            "output": str(tmp_path / "run"),
        }
    )


def test_local_is_train_called_round_after_round(settings: RunSettings) -> None:
    bench = open_bench(settings)
    examples = bench.tuned.encode(bench.federation.parts[1].train, settings.data).examples
    bench.tuned.merge(None)
    first = derive_seed(3, 1, "client-01")
    adapter = draw(bench.tuned.shapes, 2, first, settings.lora.scale_of(2))
    for seed in (first, derive_seed(3, 2, "client-01")):
        adapter = train(bench.tuned, examples, adapter, settings.local, seed, dropout=0.1).adapter
    alone = train_alone(bench, 1)
    assert [trained.steps for trained in alone] == [2, 2]
    for name, factors in adapter.items():
        assert (factors.a == alone[-1].adapter[name].a).all()
        assert (factors.b == alone[-1].adapter[name].b).all()
    records = run_reference("local", settings)
    expected = bench.tuned.evaluate_global(None, adapter, bench.held_out).loss
    assert records[1]["clients"][1]["held_out_loss"] == expected
    own = bench.tuned.encode(bench.federation.parts[1].held_out, settings.data).examples
    loss = bench.tuned.evaluate_global(None, adapter, own).loss
    assert records[1]["client_held_out"][1]["loss"] == loss


@pytest.mark.parametrize("name", ["central", "local"])
def test_a_reference_is_written_like_a_run(name: str, settings: RunSettings) -> None:
    records = run_reference(name, settings)
    run = read_run(Path(settings.output))
    assert (run.name, run.seed, run.rounds) == (name, 3, records)
    base, end = records
    assert (base["round"], end["round"]) == (0, 2)
    assert end["bytes_up"] == end["bytes_down"] == 0
    assert end["seconds"] > 0
    assert end["held_out_loss"] != base["held_out_loss"]
    for record in records:
        assert [each["client"] for each in record["client_held_out"]] == ["client-00", "client-01"]


def test_the_mean_over_clients_counts_each_once(settings: RunSettings) -> None:
    end = run_reference("local", settings)[1]
    losses = [client["held_out_loss"] for client in end["clients"]]
    assert end["held_out_loss"] == pytest.approx(sum(losses) / 2)
    own = end["client_held_out"]
    tokens = sum(each["tokens"] for each in own)
    mean = sum(each["loss"] * each["tokens"] for each in own) / tokens
    assert end["client_held_out_loss"] == pytest.approx(mean)


def test_central_takes_the_steps_of_all_clients_together(settings: RunSettings) -> None:
    end = run_reference("central", settings)[1]
    parts = open_bench(settings).federation.parts
    steps = sum(plan_steps(len(part.train), settings.local) for part in parts)
    assert end["train_steps"] == 2 * steps


def test_central_is_that_of_simulate(
    bouquet: Run, small_job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ModuleType("reports.page")
    page.write_report = lambda folder, runs: folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reports.page", page)
    sampled = ["-n", "4", "--fraction", "0.5"]
    assert bouquet(*small_job, *sampled, "--central", "-o", "one")[0] == 0
    job = ["compare", *small_job[1:], *sampled, "--seeds", "1"]
    assert bouquet(*job, "-s", "central,flora", "-o", "both")[0] == 0
    run = read_run(Path("both/runs/central/seed-0"))
    kept = json.loads(Path("one/central.json").read_text())
    assert run.rounds[-1]["held_out_loss"] == kept["held_out_loss"]
    assert run.rounds[-1]["train_steps"] == kept["steps"]


@pytest.fixture
def classification(settings: RunSettings, tmp_path: Path) -> RunSettings:
    rows = [
        {"text": f"the number {k} is {'odd' if k % 2 else 'even'}", "label": k % 2}
        for k in range(40)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    own = {"path": str(path), "text": "text", "label": "label"}
    return run_settings(
        flatten(settings),
        {"task": "classification", "model.path": str(save_bert(tmp_path / "bert"))},
        {f"data.{name}": value for name, value in own.items()},
    )


@pytest.mark.parametrize("name", ["central", "local"])
def test_a_classifier_is_judged_by_accuracy_too(name: str, classification: RunSettings) -> None:
    base, end = run_reference(name, classification)
    for record in (base, end):
        assert 0.0 <= record["held_out_accuracy"] <= 1.0
        assert 0.0 <= record["held_out_macro_f1"] <= 1.0
        assert all("accuracy" in each for each in record["client_held_out"])
    assert end["held_out_loss"] != base["held_out_loss"]


def test_a_client_alone_goes_on_from_its_own_head(classification: RunSettings) -> None:
    bench = open_bench(classification)
    first, second = train_alone(bench, 0)
    examples = bench.encode(bench.federation.parts[0].train)
    seed = derive_seed(3, 2, "client-00")
    again = train(
        bench.tuned,
        examples,
        first.adapter,
        classification.local,
        seed,
        dropout=0.1,
        head=first.head,
    )
    assert bench.head
    for name in bench.head:
        assert (again.head[name] == second.head[name]).all()
        assert (first.head[name] != bench.head[name]).any()
