"""What is no base model is known before anything is loaded, and said in one message."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from adapters.adapter import draw
from adapters.peft_files import write_peft
from core.errors import UsageError
from models.base_model import load_base_model
from models.model_files import find_model

ROOT = Path(__file__).resolve().parents[2]
SILENT = "http://127.0.0.1:9"


@pytest.fixture
def models(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `models` with `my-model` and an adapter in it, below the current one."""
    shutil.copytree(llama_folder, tmp_path / "models" / "my-model")
    write_peft(draw({"q": (3, 4)}, 2, 0, 1.0), tmp_path / "models" / "my-adapter", "hub/base")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def message(path: str) -> str:
    with pytest.raises(UsageError) as refusal:
        find_model(path)
    return str(refusal.value)


def test_a_folder_is_a_folder(models: Path) -> None:
    place = find_model("models/my-model")
    assert (place.name, place.local_only) == ("models/my-model", True)


@pytest.mark.parametrize("path", ["models/my-modl", "./models/my-modl", "models/../models/my-modl"])
def test_a_mistyped_folder_is_known_at_once(path: str, models: Path) -> None:
    said = message(path)
    assert said.startswith(f"model.path names {path!r}, where there is no folder; the nearest is ")
    assert "models/my-model" in said


def test_a_folder_below_one_that_is_not_there_is_named(models: Path) -> None:
    assert message("./modls/my-model").endswith("where there is no folder, nor is there modls")


def test_a_name_that_can_be_no_hub_id_is_a_folder(models: Path) -> None:
    assert "'models/mine/v2', where there is no folder" in message("models/mine/v2")
    assert "'my model', where there is no folder" in message("my model")


def test_offline_a_hub_id_outside_the_cache_is_refused(models: Path) -> None:
    expected = "no model 'nobody/nothing': there is no such folder, and as a hub id it is not in "
    assert message("nobody/nothing").startswith(expected)
    assert message("nobody/nothing").endswith("HF_HUB_OFFLINE is set")
    Path("gpt-two").mkdir()
    assert "there is no such folder; the nearest is gpt-two, and" in message("gpt-tow")


def test_a_hub_id_in_the_cache_is_taken_from_there(models: Path) -> None:
    kept = put_into_cache("models/my-modl", models / "my-model")
    place = find_model("models/my-modl")
    assert (place.name, place.local_only) == (str(kept), True)


def put_into_cache(name: str, source: Path, cache: Path = Path(constants.HF_HUB_CACHE)) -> Path:
    folder = cache / ("models--" + name.replace("/", "--"))
    shutil.rmtree(folder, ignore_errors=True)
    commit = "0" * 40
    shutil.copytree(source, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


def test_an_adapter_is_no_base_model(models: Path) -> None:
    assert message("models/my-adapter") == (
        "models/my-adapter is an adapter of hub/base, no base model: use --model hub/base "
        "--start-from models/my-adapter"
    )
    config = models / "my-adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": None}))
    assert "is an adapter, no base model: use --model BASE --start" in message("models/my-adapter")


def test_a_base_model_with_an_adapter_in_its_folder_is_refused(models: Path) -> None:
    shutil.copytree(models / "my-adapter", models / "my-model", dirs_exist_ok=True)
    expected = "models/my-model holds a base model and, in adapter_config.json, an adapter, which "
    assert message("models/my-model").startswith(expected)


def test_a_folder_without_config_json_is_said_to_be_none(models: Path) -> None:
    (models / "my-model" / "config.json").unlink()
    assert message("models/my-model").startswith(
        "models/my-model holds no model: expected config.json, safetensors weights and tokenizer; "
        "it holds chat_template.jinja, generation_config.json, model.safetensors, "
    )
    assert message("models").endswith("it holds my-adapter, my-model")
    (models / "my-model" / "config.json").write_text("{}")
    assert message("models").endswith("; a model lies in models/my-model")
    (models / "my-model" / "config.json").unlink()
    (models / "my-model" / "model.gguf").touch()
    assert "holds model.gguf, but no config.json: Bouquet trains on" in message("models/my-model")
    assert message("models/my-model/model.gguf").startswith("model.path names the file models/my-")


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub with nothing but some/adapter, which has no model, and some/both, which has all."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        known = "EntryNotFound" if "some/adapter" in self.path else "RepoNotFound"
        self.send_response(200 if "some/both" in self.path else 404)
        self.send_header("X-Error-Code", known)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """In silence."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(endpoint: str, name: str, folder: Path) -> str:
    """What a process that may ask this hub says of this name; without retries it is quick."""
    code = f"from models.model_files import find_model\nfind_model({name!r})"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ran.stderr.count("Retrying") == 0
    return ran.stderr.strip().splitlines()[-1]


def test_a_hub_that_has_no_such_model_or_does_not_answer_is_asked_once(
    hub: str, tmp_path: Path
) -> None:
    assert ask(hub, "some/model", tmp_path).endswith(
        "the hub has none of that name, or not for you: hf auth login"
    )
    assert ask(hub, "some/adapter", tmp_path).endswith(
        "the hub's some/adapter holds no config.json: expected a model"
    )
    assert "the hub does not answer (" in ask(SILENT, "some/model", tmp_path)
    assert "some/both holds a base model and, in adapter_config.json" in ask(
        hub, "some/both", tmp_path
    )


def test_where_the_hub_does_not_answer_the_cache_is_loaded_without_retries(
    llama_folder: Path, tmp_path: Path
) -> None:
    put_into_cache("some/model", llama_folder, tmp_path / "home" / "hub")
    code = (
        "from models.base_model import load_base_model\n"
        "print(load_base_model('some/model', 'float32', 'cpu').identity)"
    )
    environment = {**os.environ, "HF_ENDPOINT": SILENT, "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "Retrying" not in ran.stderr
    assert ran.stdout.strip() == load_base_model(str(llama_folder), "float32", "cpu").identity
