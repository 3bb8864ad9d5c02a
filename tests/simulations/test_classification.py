"""A federated classifier, from the command line to plain PEFT."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from flwr.app import Message
from flwr.serverapp import Grid

from client.app import app
from journal.run_folder import read_config
from journal.state import load_state
from server.rounds import run_rounds
from settings.keys import flatten
from settings.run import run_settings
from simulations.grid import InProcessGrid
from tasks.partition import global_held_out
from tests.conftest import Run
from tools.rehearsal.tiny_models import save_bert
from wire.head import unpack_head
from wire.records import from_record

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
LABELS = ("bad", "good", "so-so")


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    data = tmp_path / "reviews.jsonl"
    rows = [
        {"text": f"the film {k} was {LABELS[k % 3]}", "label": LABELS[k % 3]} for k in range(240)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    return [
        *("simulate", "--task", "classification", "--data", str(data), "--steps", "3"),
        *("--model", str(save_bert(tmp_path / "bert")), "--partition", "dirichlet", "--lr", "0.03"),
        *("--set", "data.prompt=text", "--set", "data.field=label", "--set", "data.context=32"),
        *("--set", "data.labels=bad,good,so-so", "--set", "data.held-out=0.2"),
        *("--set", "local.precision=float32", "--set", "local.batch-size=4", "--rounds", "2"),
    ]


def records_of(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("flora", "4,2,1"), ("fedavg", "3,3,3"), ("frlora", "3,3,3")]
)
def test_plain_peft_finds_the_simulators_loss_and_accuracy(
    bouquet: Run, job: list[str], tmp_path: Path, strategy: str, ranks: str
) -> None:
    code, _, errors = bouquet(*job, "--strategy", strategy, "--ranks", ranks, "-o", "run")
    assert code == 0, errors
    torch.manual_seed(99)  # so that a head which is not replaced would be another
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bert", num_labels=3, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, "run/adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    from journal.run_folder import read_config

    settings = run_settings({**read_config(Path("run/config.toml")), "output": ""})
    held_out = global_held_out(settings.data, 3, settings.seed, 0, "classification")
    assert len(held_out) > 10
    losses, hits = [], []
    for example in held_out:
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        label = torch.tensor([LABELS.index(example.response)])
        with torch.no_grad():
            output = model(input_ids=ids, labels=label)
        losses.append(float(output.loss))
        hits.append(int(output.logits.argmax()) == int(label))
    last = records_of("run")[-1]
    assert last["held_out_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert last["held_out_accuracy"] == pytest.approx(np.mean(hits))
    assert last["held_out_loss"] != records_of("run")[0]["held_out_loss"]
    assert json.loads(Path("run/adapter/labels.json").read_text())


def test_the_heads_are_averaged_by_examples(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[tuple[int, bytes]] = []
    pull = InProcessGrid.pull_messages

    def listening(self: Grid, message_ids: list[str]) -> list[Message]:
        replies = list(pull(self, message_ids))  # type: ignore[arg-type]
        for reply in replies:
            if "head" in reply.content:
                metrics = reply.content["metrics"]
                caught.append((int(metrics["num-examples"]), from_record(reply.content["head"])))  # type: ignore[index, call-overload, arg-type]
        return replies

    monkeypatch.setattr(InProcessGrid, "pull_messages", listening)
    assert bouquet(*job, "--ranks", "2,2,2", "--rounds", "1", "-o", "run")[0] == 0
    state = load_state(Path("run/state"))
    assert state is not None
    assert state.model.head is not None
    counts = [count for count, _ in caught]
    assert len(caught) == 3
    assert len(set(counts)) > 1
    heads = [unpack_head(data, state.head_shapes) for _, data in caught]
    for name, found in state.model.head.items():
        wanted = sum(
            n / sum(counts) * head[name].astype(np.float64)
            for n, head in zip(counts, heads, strict=True)
        )
        assert np.allclose(found, wanted, rtol=1e-6, atol=1e-9)
        assert not np.allclose(heads[0][name], heads[1][name])


def test_a_personal_method_tells_what_each_client_is_worth(bouquet: Run, job: list[str]) -> None:
    assert bouquet(*job, "--strategy", "fedsa-lora", "--ranks", "2,2,2", "-o", "run")[0] == 0
    last = records_of("run")[-1]
    assert "held_out_loss" not in last
    found = last["client_held_out"]
    assert isinstance(found, list)
    assert {"client", "loss", "accuracy", "macro_f1"} <= set(found[0])
    assert not Path("run/adapter").exists()


def travelled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all records that go either way from here on."""
    names: list[str] = []
    pull, push = InProcessGrid.pull_messages, InProcessGrid.push_messages

    def pulling(self: Grid, message_ids: list[str]) -> list[Message]:
        replies = list(pull(self, message_ids))  # type: ignore[arg-type]
        names.extend(f"up:{name}" for reply in replies for name in reply.content)
        return replies

    def pushing(self: Grid, messages: list[Message]) -> list[str]:
        names.extend(f"down:{name}" for message in messages for name in message.content)
        return list(push(self, messages))  # type: ignore[arg-type]

    monkeypatch.setattr(InProcessGrid, "pull_messages", pulling)
    monkeypatch.setattr(InProcessGrid, "push_messages", pushing)
    return names


def own_loss(record: dict[str, float]) -> float:
    return record["client_held_out_loss"]


OWN = (
    *("--set", "data.client-held-out=0.2", "--set", "data.dirichlet-alpha=0.1"),
    *("--lr", "0.01", "--steps", "8", "--rounds", "3", "--ranks", "2,2,2"),
)


@pytest.mark.parametrize(
    ("strategy", "head"), [("fedsa-lora", "auto"), ("fedsa-lora", "own"), ("fedavg", "own")]
)
def test_an_own_head_never_travels_and_each_clients_own_loss_falls(
    bouquet: Run, job: list[str], monkeypatch: pytest.MonkeyPatch, strategy: str, head: str
) -> None:
    names = travelled(monkeypatch)
    extra = (*OWN, "--strategy", strategy, "--set", f"clients.head={head}")
    code, _, errors = bouquet(*job, *extra, "-o", "run")
    assert code == 0, errors
    assert "up:adapter" in names
    assert not {"up:head", "down:head"} & set(names)
    records = records_of("run")
    assert "held_out_loss" in records[0]  # of the base, under the head that all begin with
    assert not [name for record in records[1:] for name in record if name.startswith("held_out")]
    assert own_loss(records[-1]) < own_loss(records[0])
    assert len({client["loss"] for client in records[-1]["client_held_out"]}) == 3  # type: ignore[attr-defined]
    state = load_state(Path("run/state"))
    assert state is not None
    assert state.model.head is None


def test_under_a_personal_method_an_own_head_fits_its_client_better_than_a_shared_one(
    bouquet: Run, job: list[str]
) -> None:
    found = {}
    for head in ("own", "shared"):
        extra = (*OWN, "--strategy", "fedsa-lora", "--set", f"clients.head={head}")
        assert bouquet(*job, *extra, "-o", head)[0] == 0
        found[head] = own_loss(records_of(head)[-1])
    assert found["own"] < found["shared"]


def test_a_run_with_own_heads_resumes_to_the_same_bytes(bouquet: Run, job: list[str]) -> None:
    extra = ("--strategy", "fedsa-lora", "--ranks", "2,2,2")
    assert bouquet(*job, *extra, "--rounds", "3", "-o", "whole")[0] == 0
    assert bouquet(*job, *extra, "--rounds", "1", "-o", "torn")[0] == 0
    assert bouquet("simulate", "--resume", "torn", "--rounds", "3")[0] == 0
    kept = {
        folder: {
            str(path.relative_to(folder)): path.read_bytes()
            for part in ("clients", "state/round-0003")
            for path in Path(folder, part).rglob("*.safetensors")
        }
        for folder in ("whole", "torn")
    }
    assert kept["whole"] == kept["torn"]
    assert kept["whole"]
    assert [own_loss(r) for r in records_of("whole")] == [own_loss(r) for r in records_of("torn")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--set", "evaluate.trained=true"), "evaluate.trained needs the clients' heads"),
        (("--task", "causal"), "clients.head=own is for task=classification"),
    ],
)
def test_own_heads_are_refused_where_they_make_no_sense(
    bouquet: Run, job: list[str], change: tuple[str, str], reason: str
) -> None:
    own = ("--set", "clients.head=own", "--ranks", "2,2,2")
    code, _, errors = bouquet(*job, *own, *change, "-o", "run")
    assert code == 2
    assert reason in " ".join(errors.split())
    assert not Path("run").exists()


def test_own_heads_need_something_to_be_evaluated_on(bouquet: Run, job: list[str]) -> None:
    own = ("--set", "clients.head=own", "--ranks", "2,2,2", "--set", "data.client-held-out=0")
    code, _, errors = bouquet(*job, *own, "-o", "run")
    assert code == 2
    said = " ".join(errors.split())
    assert "clients.head=own leaves no whole global model: each client is evaluated on" in said
    assert "Set data.client-held-out, such as 0.1" in said
    assert not Path("run").exists()


def test_a_test_set_for_the_global_model_is_none_for_own_heads(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "film", "label": "good"}\n')
    own = ("--set", "clients.head=own", "--ranks", "2,2,2", "--eval-data", "test.jsonl")
    code, _, errors = bouquet(*job, *own, "-o", "run")
    assert code == 2
    assert "clients.head=own leaves no whole global model" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("data.labels=bad,good", "so-so"),
        ("data.label=verdict", "has no field 'verdict'"),
        ("model.path=embedded", None),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    bouquet: Run, job: list[str], change: str, reason: str | None
) -> None:
    code, _, errors = bouquet(
        *job, "--ranks", "2,2,2", "--steps", "1", "--set", change, "-o", "run"
    )
    assert code == (0 if reason is None else 2)
    if reason is not None:
        assert reason in errors.replace("\n", " ")
        assert not Path("run").exists()


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_order_of_the_labels_is_written_wherever_the_server_runs(
    evaluates: bool, job: list[str], tmp_path: Path
) -> None:
    """As under `flwr run`, where nothing has read the data before the server starts."""
    names = ("--data", "--model")
    data, model = (job[job.index(name) + 1] for name in names)
    settings = run_settings(
        {
            "task": "classification",
            "model.path": model,
            "data.path": data,
            "data.prompt": "text",
            "data.context": 32,
            "clients.count": 2,
            "lora.rank": 2,
            "local.max-steps": 1,
            "rounds": 1,
            "evaluate.server": evaluates,
            "output": str(tmp_path / "run"),
        }
    )
    folder = run_rounds(InProcessGrid(app, 2, flatten(settings)), settings)
    assert read_config(folder / "config.toml")["data.labels"] == "bad,good,so-so"
    named = json.loads((folder / "adapter" / "labels.json").read_text())
    assert named["id2label"] == dict(zip("012", LABELS, strict=True))
    again = replace(settings, resume=True, rounds=2)
    run_rounds(InProcessGrid(app, 2, flatten(again)), again)
    assert len(records_of(str(folder))) == 3
