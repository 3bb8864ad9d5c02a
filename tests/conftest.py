"""What every test may ask for: tiny models on disk, and no network and no trace in the home folder.

The environment is set before any test module is imported, because these libraries read it once.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

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
    from tests.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT2LMHeadModel: Conv1D layers, a tokenizer with one special token."""
    from tests.tiny_models import save_gpt2

    return save_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel, which generates nothing."""
    from tests.tiny_models import save_bert

    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(params=["llama", "gpt2"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of causal language model in turn."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder
