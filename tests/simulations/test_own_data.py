"""What a user brings, from the command line to the run's folder: counted, compared, remembered."""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from core.errors import UsageError
from journal.data_files import refuse_changed_data
from journal.run_folder import read_config
from journal.state import FORMAT
from server.data_record import data_record, evaluated_record
from server.evaluation import with_labels
from server.rounds import run_rounds
from settings.keys import flatten
from simulations.grid import InProcessGrid
from simulations.simulate import Plan, prepare
from tasks.partition import Federation
from tests.conftest import Run
from tools.rehearsal.tiny_models import save_bert, settings_for

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")


def write(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def rows(count: int, word: str = "what", first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{word} is {k}?", "response": f"it is {k * k}"}
        for k in range(first, first + count)
    ]


@pytest.fixture
def job(tiny_model: Path) -> list[str]:
    return [
        *("simulate", "--model", str(tiny_model), "--ranks", "2,2", "--steps", "1"),
        *("--set", "data.context=48", "--set", "local.precision=float32", "--rounds", "1"),
        *("--set", "clients.min-examples=1"),
    ]


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_a_run_goes_on_where_its_data_moved_and_not_where_they_changed(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    first, second = (
        write(tmp_path / "a.jsonl", rows(20)),
        write(tmp_path / "b.jsonl", rows(20, "no")),
    )
    assert bouquet(*job, "--data", "a.jsonl,b.jsonl", "-o", "run")[0] == 0
    kept = json.loads(Path("run/data.json").read_text())
    assert [(each["file"], each["rows"]) for each in kept["data"]] == [
        (str(first), 20),
        (str(second), 20),
    ]
    on = ["simulate", "--resume", "run", "--rounds", "2"]
    write(second, [*rows(19, "no"), {"prompt": "no is 19?", "response": "it is 360"}])
    code, _, errors = bouquet(*on)
    assert code == 2
    assert f"{second} has changed since run began: it held 20 rows" in flat(errors)
    assert len(Path("run/rounds.jsonl").read_text().splitlines()) == 2
    write(second, [{**row, "id": k} for k, row in enumerate(rows(20, "no"))])  # another column
    (tmp_path / "away").mkdir()
    moved = [
        shutil.move(file, tmp_path / "away" / f"moved-{file.name}") for file in (first, second)
    ]
    code, _, errors = bouquet(*on, "--data", ",".join(map(str, moved)))
    assert code == 0, errors
    assert len(Path("run/rounds.jsonl").read_text().splitlines()) == 3


def test_a_run_goes_on_from_any_folder(
    bouquet: Run, job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "my data.jsonl", rows(20))
    assert bouquet(*job, "--data", "my data.jsonl", "-o", "my run")[0] == 0
    adapter = json.loads((tmp_path / "my run/adapter/adapter_config.json").read_text())
    assert Path(adapter["base_model_name_or_path"]).is_absolute()
    code, _, errors = bouquet(*job, "--data", "my data.jsonl", "-o", "my run")
    assert code == 2
    assert "go on with: bouquet simulate --resume 'my run'" in errors
    monkeypatch.chdir("/")
    code, _, errors = bouquet("simulate", "--resume", tmp_path / "my run", "--rounds", "2")
    assert code == 0, errors


def test_other_files_than_the_runs_are_refused(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", rows(20))
    write(tmp_path / "b.jsonl", rows(20, "no"))
    assert bouquet(*job, "--data", "a.jsonl", "-o", "run")[0] == 0
    on = ["simulate", "--resume", "run", "--rounds", "2", "--data"]
    code, _, errors = bouquet(*on, "a.jsonl,b.jsonl")
    assert (code, "1 files of data.path, and now there are 2" in errors) == (2, True)
    code, _, errors = bouquet(*on, "b.jsonl")
    assert (code, f"b.jsonl, then {tmp_path}/a.jsonl, has changed" in errors) == (2, True)


def test_a_run_of_another_version_says_how_it_can_be_read(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", rows(20))
    assert bouquet(*job, "--data", "a.jsonl", "-o", "my run")[0] == 0
    for manifest in Path("my run/state").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace(FORMAT, "bouquet-state-3"))
    code, _, errors = bouquet("simulate", "--resume", "my run", "--rounds", "2")
    assert code == 2
    assert "my run was begun by another version of Bouquet and cannot be resumed" in errors
    assert f"`{shlex.join(['bouquet', 'report', 'my run'])}` draws its rounds" in errors
    assert bouquet("report", "my run")[0] == 0


def test_a_comparison_goes_on_with_the_same_data_only(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", rows(20))
    write(tmp_path / "test.jsonl", rows(5, first=20))
    compare = ["compare", "-s", "flora", "--seeds", "1", *job[1:], "-o", "all", "--data", "a.jsonl"]
    code, _, errors = bouquet(*compare, "--eval-data", "test.jsonl")
    assert code == 0, errors
    last = json.loads(Path("all/runs/flora/seed-0/rounds.jsonl").read_text().splitlines()[-1])
    assert "held_out_loss" in last
    assert "client_held_out" not in last  # they hold nothing out
    write(tmp_path / "test.jsonl", rows(5, first=21))
    code, _, errors = bouquet(*compare, "--eval-data", "test.jsonl", "--seeds", "2")
    assert code == 2
    assert f"{tmp_path}/test.jsonl has changed since all began" in flat(errors)


def test_the_header_counts_each_reason_under_its_own_name(
    bouquet: Run, job: list[str], tmp_path: Path
) -> None:
    odd = [
        {"prompt": "p", "response": ""},
        {"prompt": "p", "response": None},
        {"prompt": "q", "response": None},
        {"prompt": "long", "response": "a b c d e f " * 40},
        *rows(2),
    ]
    write(tmp_path / "site[1].jsonl", [*rows(20), *odd])
    write(tmp_path / "site1.jsonl", [{"not": "this"}])
    write(tmp_path / "test, own.jsonl", rows(7, first=18))
    code, said, errors = bouquet(
        *job, "--data", "site[1].jsonl", "--eval-data", "test, own.jsonl", "-o", "run"
    )
    assert code == 0, errors
    said = flat(said)
    assert "data site[1].jsonl: 23 training examples dealt at random (11 to 12 each), 7 in " in said
    assert "7 in test, own.jsonl to test" in said
    for words in (
        "2 examples: left out, the response or text is null",
        "1 example: left out, the response or text is empty",
        "1 example: the end is cut off at data.context=48 tokens",
        "2 examples: the same as an earlier one",
        "2 examples: in the test set and in the training data",
    ):
        assert words in said
    assert len(json.loads(Path("run/data.json").read_text())["evaluation"]) == 1


def plan_of(model: Path, **values: Any) -> Plan:
    fixed = {"clients__count": 2, "lora__rank": "2"}
    return prepare(settings_for(model, **fixed | values))


def test_a_client_with_no_example_left_is_named_with_its_file_and_the_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", rows(20))
    long = [{"prompt": f"{k} a b c d e f " * 20, "response": "r"} for k in range(4)]
    write(tmp_path / "b.jsonl", long)
    with pytest.raises(UsageError) as raised:
        plan_of(
            tiny_model,
            data__path=str(tmp_path),
            data__partition="files",
            data__max_prompt=64,
            data__client_held_out=0.0,
            data__held_out=0.0,
            evaluate__server=False,
        )
    assert str(raised.value) == (
        f"client-01: none of 4 examples of {tmp_path}/b.jsonl leaves room for a response within "
        "data.context=64 tokens: raise it, or lower data.max-prompt"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"evaluate__clients": True}, "evaluate.clients=true, but the clients hold nothing out"),
        ({"strategy__name": "fedsa-lora"}, "fedsa-lora has no global model: each client is eval"),
    ],
)
def test_clients_that_hold_nothing_out_cannot_evaluate(
    values: dict[str, Any], words: str, tiny_model: Path, tmp_path: Path
) -> None:
    write(tmp_path / "a.jsonl", rows(20))
    write(tmp_path / "t.jsonl", rows(2))
    paths = {"data__path": str(tmp_path / "a.jsonl"), "data__evaluation": str(tmp_path / "t.jsonl")}
    with pytest.raises(UsageError, match=words):
        plan_of(tiny_model, **paths, **values)
    share = {"data__client_held_out": "0.2"}
    assert sum(plan_of(tiny_model, **paths, **values, **share).train_examples) == 16


def test_the_order_of_the_labels_stands_in_the_run_and_beside_the_adapter(
    bouquet: Run, tmp_path: Path
) -> None:
    one = [{"text": f"film {k}", "label": [2, 7, 0][k % 3]} for k in range(30)]
    two = [{"text": f"play {k}", "label": [2.0, "7", "0.0"][k % 3]} for k in range(30)]
    write(tmp_path / "a.jsonl", one)
    write(tmp_path / "b.jsonl", two)
    code, said, errors = bouquet(
        *("simulate", "--task", "classification", "--model", save_bert(tmp_path / "bert")),
        *("--data", "a.jsonl,b.jsonl", "--set", "data.text=text", "--set", "data.context=32"),
        *("--ranks", "2,2", "--steps", "1", "--rounds", "1", "-o", "run"),
        *("--set", "data.held-out=0.1", "--set", "data.client-held-out=0"),
        *("--set", "clients.min-examples=1"),
    )
    assert code == 0, errors
    assert read_config(Path("run/config.toml"))["data.labels"] == "0,2,7"
    labels = json.loads(Path("run/adapter/labels.json").read_text())
    assert labels["id2label"] == {"0": "0", "1": "2", "2": "7"}
    assert "3 classes: 0 (" in flat(said)
    code, _, errors = bouquet("simulate", "--resume", "run", "--rounds", "2")
    assert code == 0, errors


def test_a_server_that_evaluates_takes_the_labels_from_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "t", "label": k % 3} for k in range(9)])
    values = {"data__path": str(path), "task": "classification"}
    found = with_labels(settings_for(tmp_path, **values))
    assert found.data.labels == "0,1,2"
    assert with_labels(found) == found
    blind = settings_for(tmp_path, **values, evaluate__server=False)
    assert with_labels(blind) == blind


def test_a_chat_template_is_known_by_what_it_says(tmp_path: Path) -> None:
    file, moved = tmp_path / "chat.jinja", tmp_path / "moved.jinja"
    file.write_text("{{ messages }}")
    moved.write_text("{{ messages }}")
    nothing = Federation([], [])
    before = data_record(nothing, str(file))
    refuse_changed_data(before, data_record(nothing, str(moved)), "run")
    moved.write_text("{{ other }}")
    with pytest.raises(UsageError, match=r"moved.jinja, then .*chat.jinja, has changed since run"):
        refuse_changed_data(before, data_record(nothing, str(moved)), "run")
    with pytest.raises(UsageError, match=r"begun on 1 files of data.chat-template-file, and now"):
        refuse_changed_data(before, data_record(nothing), "run")
    with pytest.raises(UsageError, match=r"data.chat-template-file names .*, which cannot be read"):
        data_record(nothing, str(tmp_path / "gone"))


def test_a_server_that_evaluates_knows_its_test_set_again(tiny_model: Path, tmp_path: Path) -> None:
    """As under `flwr run`: no simulation counts the data for it."""
    write(tmp_path / "train.jsonl", rows(12))
    for name, word in (("test", "was"), ("moved", "was"), ("other", "will be")):
        write(tmp_path / f"{name}.jsonl", rows(6, word))
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    for name, text in (("one", plain), ("two", f"{plain}!")):
        (tmp_path / f"{name}.jinja").write_text(text)

    def play(rounds: int, test: str, template: str = "one") -> int:
        values: dict[str, Any] = {
            "data__path": str(tmp_path / "train.jsonl"),
            "data__evaluation": test and str(tmp_path / f"{test}.jsonl"),
            "data__chat_template_file": str(tmp_path / f"{template}.jinja"),
            "output": str(tmp_path / "run"),
            "rounds": rounds,
            "resume": True,
            "clients__count": 2,
            "clients__min_examples": 1,
            "lora__rank": "2",
            "local__max_steps": 1,
        }
        settings = settings_for(tiny_model, **values)
        run_rounds(InProcessGrid(client_app, 2, flatten(settings)), settings)
        return len((tmp_path / "run/rounds.jsonl").read_text().splitlines())

    assert play(1, "test") == 2
    kept = json.loads((tmp_path / "run/data.json").read_text())
    assert {part: [each["file"] for each in files] for part, files in kept.items()} == {
        "evaluation": [str(tmp_path / "test.jsonl")],
        "chat-template": [str(tmp_path / "one.jinja")],
    }
    with pytest.raises(UsageError, match=r"other.jsonl, then .*test.jsonl, has changed since"):
        play(2, "other")
    with pytest.raises(UsageError, match=r"begun on 1 files of data.evaluation, and now there are"):
        play(2, "")
    with pytest.raises(UsageError, match=r"two.jinja, then .*one.jinja, has changed since"):
        play(2, "test", template="two")
    assert play(2, "moved") == 3


def test_a_server_that_does_not_evaluate_reads_no_data(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, data__path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(UsageError, match="where there is no"):
        evaluated_record(settings)
    blind = replace(settings, evaluate=replace(settings.evaluate, server=False))
    assert evaluated_record(blind) is None


def test_a_folder_that_does_not_fit_is_known_before_anything_is_read(
    bouquet: Run, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    nothing = ["--data", "no-such-file.jsonl", "--model", "./no-such-model"]
    code, out, errors = bouquet("simulate", *nothing, "-o", "there")
    assert (code, out) == (2, "")
    assert "there exists already. Choose another output" in flat(errors)
