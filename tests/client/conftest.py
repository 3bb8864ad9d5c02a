"""A run of three clients on the tiny Llama, in a process that holds no model yet."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from models import tuned_model
from models.tuned_model import TunedModel
from tests.client.app_messages import Config, run_config, write
from tools.rehearsal.tiny_models import open_model


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No resident model, and the identity without which Flower makes no message."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    tuned_model._resident.cache_clear()
    yield
    tuned_model._resident.cache_clear()


@pytest.fixture
def config(llama_folder: Path, tmp_path: Path) -> Config:
    return run_config(llama_folder, write(tmp_path / "rows.jsonl", 40))


@pytest.fixture
def tuned(llama_folder: Path) -> TunedModel:
    """The same base model, apart from the app's."""
    return open_model(llama_folder)
