"""What a person types, and what comes back: results, and errors that say what to do."""

import json
from pathlib import Path

import pytest

from strategies.registry import STRATEGIES
from tests.conftest import Run
from tools.rehearsal.tiny_models import save_bert


def test_a_run_prints_each_round_and_writes_its_folder(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    code, out, err = bouquet(*small_job, "--output", "runs/try", "--central")
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "try"
    assert {path.name for path in folder.iterdir()} == {
        *("config.toml", "data.json", "rounds.jsonl", "state", "status.json", "clients"),
        *("adapter", "central.json"),
    }
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        assert f"{record['held_out_loss']:.4f}" in out
    central = json.loads((folder / "central.json").read_text())
    assert central["steps"] == 2 * 2 * 2
    assert f"{central['held_out_loss']:.4f}" in out
    for words in ("FLoRA", "train loss", "held-out loss", "noise", "base, as shipped", "Next"):
        assert words in out
    assert "bouquet simulate --resume runs/try --rounds 4" in out


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_reference_is_computed_again(
    bouquet: Run, small_job: list[str], tmp_path: Path, damage: str
) -> None:
    assert bouquet(*small_job, "--output", "try", "--central", "--rounds", "1")[0] == 0
    path = tmp_path / "try" / "central.json"
    before = json.loads(path.read_text())
    path.write_text(damage)
    code, out, _ = bouquet("simulate", "--resume", "try", "--central")
    assert code == 0
    again = json.loads(path.read_text())
    assert again["held_out_loss"] == before["held_out_loss"]
    assert f"{before['held_out_loss']:.4f}" in out
    assert not list(path.parent.glob(".writing-*"))


def test_runs_without_output_are_numbered(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    for _ in range(2):
        assert bouquet(*small_job)[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "flora-warm-001",
        "flora-warm-002",
    }


@pytest.mark.parametrize("strategy", ["fedavg", "zero-padding"])
def test_other_strategies_do_the_same_job(
    bouquet: Run, small_job: list[str], strategy: str
) -> None:
    code, out, err = bouquet(*small_job, "--strategy", strategy, "--ranks", "4", "-n", "2")
    assert (code, err) == (0, "")
    assert "rounds.jsonl" in out


def test_a_run_repeats_from_its_own_config(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    assert bouquet(*small_job, "-o", "one", "--seed", "5")[0] == 0
    assert bouquet("simulate", "--config", "one/config.toml", "-o", "two")[0] == 0
    one, two = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("one", "two")
    )
    assert one == two


def test_a_longer_resume_equals_a_longer_run(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    assert bouquet(*small_job, "-o", "long", "--rounds", "3")[0] == 0
    assert bouquet(*small_job, "-o", "short")[0] == 0
    code, out, _ = bouquet("simulate", "--resume", "short", "--rounds", "3")
    assert code == 0
    assert "going on after round 2 of 3" in out
    long, short = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("long", "short")
    )
    assert long == short


USAGE = {
    "an unknown key": (
        ["--set", "local.lerning-rate=1"],
        "unknown configuration key 'local.lerning-rate'; the nearest known key is "
        "local.learning-rate",
    ),
    "an impossible rank": (["--ranks", "4,0"], "lora.rank: expected whole numbers of at least 1"),
    "a rank above the matrix": (["--ranks", "400"], "rank 400 is more than module"),
    "a key without --set": (
        ["rounds=5", "lora.rank=4"],
        "A key is given by --set rounds=5 --set lora.rank=4",
    ),
    "a rank that no site may have": (
        ["--ranks", "4", "--set", "clients.max-rank=2"],
        "--ranks has 4 and clients.max-rank is 2",
    ),
    "an impossible alpha": (["--set", "lora.alpha=-3"], "lora.alpha: expected a number above 0"),
    "mixed ranks under fedavg": (["--strategy", "fedavg"], "rank 4: client-00; rank 2: client-01"),
    "an unknown strategy": (
        ["--strategy", "flor"],
        "must be one of flora, flora-warm, fedavg, zero-",
    ),
    "targets that match nothing": (
        ["--set", "lora.target-modules=query"],
        "'query' matches no linear layer of this model; the nearest are",
    ),
    "more clients than examples": (["--clients", "99"], "clients have no examples to train on"),
    "an unmapped field": (
        ["--set", "data.prompt=question"],
        "has no field 'question'; its fields are prompt, response, topic",
    ),
    "no such file": (["--data", "nowhere.jsonl"], "where there is no file or folder"),
    "no such model": (["--model", "./nowhere"], "where there is no folder"),
    "a context beyond the model's": (["--set", "data.context=4096"], "takes at most 64"),
    "an unknown task": (["--task", "poetry"], "task must be text, one of causal, classification"),
    "a fraction of nothing": (["--fraction", "0"], "clients.fraction must be a number, above 0"),
    "too many replies wanted": (["--set", "clients.min-replies=9"], "there are only 2 clients"),
    "no round": (["--rounds", "0"], "rounds must be a whole number, at least 1; got 0"),
    "words for a number": (["--rounds", "many"], "'many' is not a valid int"),
    "an option that is none": (["--stratgy", "flora"], "No such option"),
    "an assignment that is none": (["--set", "rounds"], "--set expects key=value"),
    "a missing config": (["--config", "nowhere.toml"], "nowhere.toml cannot be read"),
    "a device that is none": (["--set", "model.device=abacus"], "device must be auto, cpu, cuda"),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_call_is_one_message_and_exit_code_2(
    name: str, bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    arguments, message = USAGE[name]
    code, _, err = bouquet(*small_job, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_causal(
    bouquet: Run, small_job: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bert = save_bert(tmp_path_factory.mktemp("bert"))
    code, _, err = bouquet(*small_job, "--model", bert)
    assert code == 2
    assert "is not a causal language model" in err


def test_an_existing_folder(bouquet: Run, small_job: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    code, _, err = bouquet(*small_job, "--output", "mine")
    assert code == 2
    assert "mine exists already. Choose another output, leave it out for a new number, or" in err
    assert "go on with: bouquet simulate --resume mine" in " ".join(err.split())


def test_resume_of_what_is_not_there(bouquet: Run) -> None:
    code, _, err = bouquet("simulate", "--resume", "runs/none")
    assert code == 2
    assert "runs/none is no folder of a run" in err


def test_a_failure_is_exit_code_1_and_names_client_and_remedy(
    bouquet: Run, small_job: list[str]
) -> None:
    code, _, err = bouquet(*small_job, "--lr", "1e30", "--set", "local.max-grad-norm=0")
    assert code == 1
    assert "round 1 has 0 usable replies" in err
    assert "client-00: the client reports: the training loss became" in err
    assert "lower local.learning-rate" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(bouquet: Run, small_job: list[str]) -> None:
    code, _, err = bouquet(*small_job, "--ranks", "400", "--debug")
    assert code == 2
    assert "Traceback" in err


HELP = {
    "": ("simulate", "compare", "report", "options", "strategies"),
    "simulate": ("Federate", "--strategy", "--task", "--resume", *STRATEGIES),
    "compare": ("--strategies", "--seeds", "4 times --rounds", "central", "local", *STRATEGIES),
    "report": ("RUN...", "--output"),
}


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_there_is(
    bouquet: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = bouquet(*command.split(), "--help")
    assert code == 0
    for words in HELP[command]:
        assert words in out


def test_options_lists_every_key_with_its_default(bouquet: Run) -> None:
    from settings.run import default_values

    code, out, _ = bouquet("options")
    assert code == 0
    for key in default_values():
        assert key in out


def test_strategies_lists_every_method(bouquet: Run) -> None:
    code, out, _ = bouquet("strategies")
    assert code == 0
    assert all(out.count(name) >= 2 for name in STRATEGIES)
    for promise in ("mixed ranks", "sums only", "personal", "bytes up", "a client learns"):
        assert promise in out


def test_a_classifier_is_judged_by_its_accuracy(bouquet: Run, tmp_path: Path) -> None:
    rows = [{"text": f"{k} is {'odd' if k % 2 else 'even'}", "label": k % 2} for k in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = ["simulate", "--task", "classification", "--model", save_bert(tmp_path / "bert")]
    job += ["--data", "texts.jsonl", "--set", "data.text=text", "--set", "data.context=32"]
    job += ["--ranks", "4", "-n", "2", "--rounds", "1", "--steps", "2", "--central"]
    for strategy, heading in (("flora", "held-out loss"), ("fedsa-lora", "clients' loss")):
        code, out, err = bouquet(*job, "-s", strategy)
        assert (code, err) == (0, "")
        summary = out[out.index("\nmodel ") :]
        assert heading in summary
        assert "accuracy" in summary
        assert "central, rank 4" in summary


def test_a_personal_method_is_judged_by_the_clients_own_parts(
    bouquet: Run, small_job: list[str]
) -> None:
    code, out, err = bouquet(*small_job, "-s", "fedsa-lora", "--ranks", "4", "-n", "2", "-o", "it")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in Path("it/rounds.jsonl").read_text().splitlines()]
    assert f"{records[-1]['client_held_out_loss']:.4f}" in out
    assert "clients' loss" in out
    assert "PeftModel" not in out
