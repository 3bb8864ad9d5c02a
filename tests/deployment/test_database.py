"""Requests to a SuperLink's database, as its start script names it, wait for each other."""

import re
import sqlite3
import threading
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from deployment.database import PATIENCE_SECONDS

SCRIPT = Path(__file__).resolve().parents[2] / "deployment" / "templates" / "start-superlink.sh"
FLOWERS_PATIENCE_SECONDS = 5.0


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SqlObjectStore:
    """Flower's store on the database that the start script names, with superlink.db in folder."""
    monkeypatch.chdir(folder)
    url = re.search(r"--database '?([^' ]+)", SCRIPT.read_text())
    assert url is not None
    store = SqlObjectStore(url[1])
    store.initialize()
    assert (folder / "superlink.db").exists()
    return store


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of alembic, in Flower
def test_a_writer_waits_longer_than_flower_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, monkeypatch)
    other = sqlite3.connect(
        tmp_path / "superlink.db", isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")
    assert FLOWERS_PATIENCE_SECONDS + 2.0 < PATIENCE_SECONDS
    unlock = threading.Timer(FLOWERS_PATIENCE_SECONDS + 2.0, other.execute, ["COMMIT"])
    unlock.start()
    record = ConfigRecord({"key": "value"})
    assert store.preregister(1, get_object_tree(record)) == [record.object_id]
    unlock.join()
    other.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of alembic, in Flower
def test_a_request_waits_until_the_one_before_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, monkeypatch)
    second = threading.Thread(target=store.get, args=["none"])
    with store.session() as first:
        first.connection()
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join()
    assert not second.is_alive()
