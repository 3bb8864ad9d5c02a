"""The ServerApp where nobody watches: an error is one message, for Flower logs what it catches."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from core.errors import UsageError
from server.app import app
from server.progress import RunObserver, observe_run
from settings.keys import flatten
from tests.fake_clients import fake_grid, settings_of


class Watching(RunObserver):
    """Sees and says nothing."""


@pytest.mark.parametrize("observed", [True, False])
def test_an_error_has_no_traceback_in_a_process_of_flowers_own(
    observed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    settings = settings_of(tmp_path / "run", strategy__name="fedavg")
    context = Context(1, 1, {}, RecordDict(), flatten(settings))
    watched = observe_run(Watching()) if observed else nullcontext()
    with watched, pytest.raises(UsageError, match="one rank for all clients"):
        app(fake_grid(settings), context)
    assert sys.tracebacklimit == (1000 if observed else 0)
    assert ("event=failed" in caplog.text) != observed
