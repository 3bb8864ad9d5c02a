"""What every test may ask for: tiny models on disk, and no network and no trace in the home folder.

The environment is set before any test module is imported, because these libraries read it once.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
"""What the fixture `bouquet` gives: (exit code, output, errors) of `bouquet ARGUMENTS`."""

_CACHE = Path(tempfile.mkdtemp(prefix="bouquet-tests-"))
os.environ["HF_HOME"] = str(_CACHE)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and the console would keep that width
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny matrices more threads only get in the way


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "embedded: needs the weights in tasks/stdlib_lm")


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM: nn.Linear layers, a tokenizer with bos, eos, pad and chat template."""
    from tools.rehearsal.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT2LMHeadModel: Conv1D layers, a tokenizer with one special token."""
    from tools.rehearsal.tiny_models import save_gpt2

    return save_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel, which generates nothing."""
    from tools.rehearsal.tiny_models import save_bert

    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(params=["llama", "gpt2"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of causal language model in turn."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.rehearsal.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        {"prompt": f"what is {k}?", "response": f"it is {k * k}", "topic": f"t{k % 5}"}
        for k in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def bouquet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Run `bouquet ARGUMENTS` in an empty folder: (exit code, output, errors)."""
    from commands import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bouquet", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(str(stopped.value.code)), captured.out, captured.err

    return run


@pytest.fixture
def small_job(tiny_model: Path, tiny_data: Path) -> list[str]:
    """A job of a second: two clients, two rounds, two steps, in float32."""
    return [
        *("simulate", "--model", str(tiny_model), "--data", str(tiny_data), "--ranks", "4,2"),
        *("--rounds", "2", "--steps", "2", "--set", "local.batch-size=4"),
        *("--set", "data.context=48", "--set", "local.precision=float32"),
    ]
