"""What a run prints under "Next" does what it says, pasted as it stands."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from commands.job_options import job_layer
from commands.summary import OF_ONE_RUN, comparison, job_of
from journal.run_folder import read_config
from settings.keys import Value
from settings.run import run_settings
from simulations.comparison_folder import load_comparison
from tasks.partition import global_held_out
from tests.conftest import Run
from tests.simulations.test_exported_adapter import plain_loss
from tools.rehearsal.tiny_models import save_bert, save_gpt2, save_llama

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),  # Conv1D
]
LABELS = ("bad", "good", "so, so")


def steps_of(out: str) -> dict[str, list[str]]:
    """Words -> the lines below them."""
    found: dict[str, list[str]] = {}
    meaning = ""
    for line in out[out.index("\nNext\n") + 6 :].splitlines():
        if line.startswith("    "):
            found[meaning].append(line[4:])
        else:
            meaning = line.strip()
            found[meaning] = []
    return found


def executed(lines: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


def test_the_printed_comparison_does_the_runs_job(
    bouquet: Run, tiny_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "it's mine.jsonl"
    data.write_text(tiny_data.read_text())
    code, out, err = bouquet(
        *("simulate", "--model", tiny_model, "--data", data.name, "--ranks", "4,2", "-o", "a run"),
        *("--rounds", "1", "--steps", "1", "--lr", "0.01", "--partition", "natural", "-s", "rbla"),
        *("--set", "data.field=topic", "--set", "data.context=40", "--set", "local.batch-size=2"),
        *("--set", "data.template=Q: {prompt}\n", "--set", "lora.alpha=8"),
        *("--set", "clients.min-examples=1"),
    )
    assert (code, err) == (0, "")
    steps = steps_of(out)
    line = steps["the same job under several strategies, side by side"]
    command = shlex.split(line[0])
    assert command[:4] == ["bouquet", "compare", "-s", "rbla,zero-padding"]
    code, _, err = bouquet(*command[1:], "--seeds", "1", "-o", "compared")
    assert (code, err) == (0, "")
    ours = read_config(Path("a run/config.toml"))
    theirs = load_comparison(Path("compared")).config
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ <= {*OF_ONE_RUN, "evaluate.clients"}
    assert bouquet(*shlex.split(steps["two rounds more"][0])[1:])[0] == 0
    assert len(Path("a run/rounds.jsonl").read_text().splitlines()) == 1 + 3
    assert Path(shlex.split(steps["every number of every round"][0])[1]).is_file()


def test_a_list_of_ranks_does_not_say_how_many_clients_there_are() -> None:
    ten = job_of(run_settings({"lora.rank": "4,2"}))
    assert ten == ["--clients", "10", "--ranks", "4,2"]
    assert job_of(run_settings({"lora.rank": "4,2", "clients.count": 2})) == ["--ranks", "4,2"]
    assert job_of(run_settings({"lora.rank": "4"})) == ["--ranks", "4"]
    assert job_of(run_settings()) == []


def test_what_follows_from_another_key_is_not_repeated() -> None:
    settings = run_settings({"data.path": "mine.jsonl", "data.context": 48})
    assert job_of(settings) == ["--data", "mine.jsonl", "--set", "data.context=48"]


def test_each_file_is_named_from_here_where_it_lies_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jsonl", "b, c.jsonl", "chat.jinja"):
        (tmp_path / name).write_text("")
    (tmp_path / "here, too").mkdir()
    monkeypatch.chdir(tmp_path)
    given: dict[str, Value] = {
        "data.path": "a.jsonl,/elsewhere/d.jsonl,e.jsonl",
        "data.evaluation": "b, c.jsonl",
        "data.chat-template-file": "chat.jinja",
        "start.adapter": "here, too",
    }
    settings = run_settings(given)
    options = job_of(settings)
    paths = dict(zip(options[::2], options[1::2], strict=True))
    assert paths["--data"] == "a.jsonl,/elsewhere/d.jsonl,e.jsonl"
    assert paths["--start-from"] == "here, too"
    assert "data.chat-template-file=chat.jinja" in options
    read = {"eval_data": paths["--eval-data"], "data": paths["--data"]}
    layer = job_layer({**read, "start_from": paths["--start-from"], "set_": [paths["--set"]]})
    assert run_settings(layer) == settings


def test_the_printed_python_loads_a_causal_model(bouquet: Run, small_job: list[str]) -> None:
    code, out, _ = bouquet(*small_job, "-o", 'my "run"')
    assert code == 0
    model = executed(steps_of(out)["use the adapter in Python"])["model"]
    assert model.base_model.model.dtype == torch.float32
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


@pytest.mark.parametrize("save", [save_bert, save_llama])
def test_the_printed_python_loads_what_clients_with_own_heads_share(
    bouquet: Run, save: Callable[[Path], Path], tmp_path: Path
) -> None:
    lines = [json.dumps({"prompt": f"film {k}", "label": LABELS[k % 3]}) for k in range(60)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    code, out, err = bouquet(
        *("simulate", "--task", "classification", "--data", "reviews.jsonl", "-o", "run"),
        *("--model", save(tmp_path / "base"), "--steps", "2", "--rounds", "1", "--ranks", "4,2"),
        *("-s", "flora", "--set", "clients.head=own", "--set", "data.context=32", "--lr", "0.03"),
    )
    assert code == 0, err
    meaning = "use the adapter in Python; no head is in it, as each client kept its own"
    names = executed(steps_of(out)[meaning])
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    assert model.config.id2label == dict(enumerate(LABELS))
    with torch.no_grad():
        inputs = tokenizer(["film 1", "a film"], return_tensors="pt", padding=True)
        shared = model(**inputs).logits
        with model.disable_adapter():
            alone = model(**inputs).logits
    assert shared.shape == (2, 3)
    assert not torch.allclose(shared, alone)


@pytest.mark.parametrize("save", [save_bert, save_gpt2, save_llama])
@pytest.mark.parametrize("listed", [True, False])
def test_the_printed_python_loads_a_classifier_that_takes_batches(
    bouquet: Run, save: Callable[[Path], Path], listed: bool, tmp_path: Path
) -> None:
    rows = [{"text": f"the film {'o' * (k % 7)} was {LABELS[k % 3]}"} for k in range(60)]
    lines = [json.dumps({**row, "label": LABELS[k % 3]}) for k, row in enumerate(rows)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    labels = ["--set", f"data.labels={json.dumps(LABELS)}"] if listed else []
    code, out, err = bouquet(
        *("simulate", "--task", "classification", "--data", "reviews.jsonl", "-o", "run", *labels),
        *("--model", save(tmp_path / "base"), "--steps", "2", "--rounds", "1", "--ranks", "4,2"),
        *("--set", "data.prompt=text", "--set", "data.context=32", "--lr", "0.03"),
        *("--set", "data.held-out=0.3", "--set", "local.precision=float32"),
    )
    assert code == 0, err
    names = executed(steps_of(out)["use the adapter in Python"])
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    if listed:
        assert model.config.id2label == dict(enumerate(LABELS))
    settings = run_settings({**read_config(Path("run/config.toml")), "output": ""})
    held_out = global_held_out(settings.data, 2, settings.seed, 0, "classification")
    texts = [example.prompt for example in held_out]
    classes = torch.tensor([sorted(LABELS).index(example.response) for example in held_out])
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        loss = model(**batch, labels=classes).loss
    last = json.loads(Path("run/rounds.jsonl").read_text().splitlines()[-1])
    assert float(loss) == pytest.approx(last["held_out_loss"], abs=1e-5)


@pytest.mark.parametrize("task", ["causal", "classification"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_printed_python_loads_a_quantized_base(
    bouquet: Run, quantization: str, task: str, tmp_path: Path
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    base = save_llama(tmp_path / "base", **wide)
    answer = "response" if task == "causal" else "label"
    rows = [{"prompt": f"the film {k}", answer: LABELS[k % 3]} for k in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = bouquet(
        *("simulate", "--task", task, "--data", "rows.jsonl", "--model", base, "--ranks", "4,2"),
        *("--steps", "4", "--rounds", "1", "--lr", "0.03", "-o", "run"),
        *("--set", f"model.quantization={quantization}", "--set", "data.context=48"),
        *("--set", "local.precision=float32"),
    )
    assert code == 0, err
    lines = steps_of(out)["use the adapter in Python"]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 76
    model = executed(lines)["model"]
    model.eval()
    for module in model.modules():  # in evaluation they round activations on a CPU
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    last = json.loads(Path("run/rounds.jsonl").read_text().splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(base)
    if task == "causal":
        found = plain_loss(model, tokenizer, Path("run/config.toml"))
    else:
        settings = run_settings({**read_config(Path("run/config.toml")), "output": ""})
        held_out = global_held_out(settings.data, 2, settings.seed, 0, task)
        texts = [example.prompt for example in held_out]
        classes = torch.tensor([sorted(LABELS).index(example.response) for example in held_out])
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            found = float(model(**batch, labels=classes).loss)
    assert found == pytest.approx(last["held_out_loss"], abs=1e-4)


def test_what_was_seen_is_counted_and_not_computed(bouquet: Run, tmp_path: Path) -> None:
    rows = [{"prompt": f"film {k}", "response": "good"} for k in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = ("simulate", "--data", "rows.jsonl", "--steps", "3", "--rounds", "1", "-o", "run")
    base = save_llama(tmp_path / "base")
    held_out = ("--set", "data.held-out=0.34", "--central", "--set", "data.context=32")
    held_out += ("--set", "clients.min-examples=1")
    code, out, err = bouquet(*job, "--model", base, "--ranks", "2,2", *held_out)
    assert code == 0, err
    last = json.loads(Path("run/rounds.jsonl").read_text().splitlines()[-1])
    seen = [client["examples_seen"] for client in last["clients"]]
    assert seen == [client["num_examples"] for client in last["clients"]]  # one epoch of one batch
    row = next(line for line in out.splitlines() if line.startswith("federated, "))
    assert row.split()[-1] == str(sum(seen))
    old = [{k: v for k, v in c.items() if k != "examples_seen"} for c in last["clients"]]
    settings = run_settings(read_config(Path("run/config.toml")))
    rounds = [{"round": 0, "held_out_loss": 2.0}, {**last, "clients": old}]
    assert list(comparison(settings, rounds, None).columns[-1].cells) == ["0", str(sum(seen))]


def test_a_finished_run_says_so_and_how_it_goes_on(bouquet: Run, small_job: list[str]) -> None:
    assert bouquet(*small_job, "--rounds", "1", "-o", "run")[0] == 0
    code, out, _ = bouquet("simulate", "--resume", "run")
    assert code == 0
    assert "finished already, after round 1: --rounds 3 goes on" in out
    assert "going on after" not in out
    assert "\nNext\n" in out
    assert "1 run on one page" in bouquet("report", "run")[1]


def test_a_personal_run_shows_the_clients_loss_in_every_row(
    bouquet: Run, small_job: list[str]
) -> None:
    code, out, err = bouquet(
        *(*small_job, "-s", "fedsa-lora", "--ranks", "2,2", "--rounds", "1", "-o", "run"),
        *("--set", "data.client-held-out=0.2"),
    )
    assert code == 0, err
    base, last = map(json.loads, Path("run/rounds.jsonl").read_text().splitlines())
    lines = out.splitlines()
    head = next(k for k, line in enumerate(lines) if line.split()[:1] == ["round"])
    assert "clients' loss" in lines[head]
    assert "held-out loss" not in out
    assert f"{base['client_held_out_loss']:.4f}" in lines[head + 1]
    assert f"{last['client_held_out_loss']:.4f}" in lines[head + 2]
    assert next(line for line in lines if line.startswith("base, as")).split()[3] == (
        f"{base['client_held_out_loss']:.4f}"
    )
