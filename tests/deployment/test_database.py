"""Requests to a SuperLink's database, as its start script names it, wait for each other."""

import re
import sqlite3
import threading
from math import nan
from pathlib import Path

import pytest
from flwr.app import ConfigRecord
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.linkstate_models import MessageRes
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from sqlalchemy import insert, select

from deployment.database import MOST_OBJECTS, PATIENCE_SECONDS, RefusedAnnouncementError

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of alembic, in Flower
def test_an_announcement_of_very_many_objects_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, monkeypatch)

    def tree(objects: int) -> ObjectTree:
        parts = [ObjectTree(object_id=f"{number:064x}") for number in range(1, objects)]
        return ObjectTree(object_id="0" * 64, children=parts)

    with pytest.raises(RefusedAnnouncementError, match="more than 4,000 objects"):
        store.preregister(1, tree(MOST_OBJECTS + 1))
    assert len(store) == 0
    assert len(store.preregister(1, tree(MOST_OBJECTS))) == MOST_OBJECTS


@pytest.mark.parametrize("field", ["created_at", "ttl"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of alembic, in Flower
def test_an_answer_whose_times_are_no_numbers_is_not_stored(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(tmp_path, monkeypatch)
    url = re.search(r"--database '?([^' ]+)", SCRIPT.read_text())
    assert url is not None
    state = SqlLinkState(url[1], NoOpFederationManager(), SqlObjectStore(url[1]))
    state.initialize()
    times = {"created_at": 1.0, "ttl": 2.0}
    with state.session() as session:
        session.execute(insert(MessageRes).values(message_id="good", **times))
    with (
        pytest.raises(RefusedAnnouncementError, match="whose times are no finite numbers"),
        state.session() as session,
    ):
        session.execute(insert(MessageRes).values(message_id="bad", **times | {field: nan}))
    with state.session() as session:
        assert list(session.scalars(select(MessageRes.message_id))) == ["good"]
