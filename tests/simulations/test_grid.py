"""The in-process Grid keeps Flower's contract."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from settings.keys import flatten
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.fake_clients import fake_app, fake_grid, settings_of


@pytest.fixture
def grid() -> InProcessGrid:
    return fake_grid(settings_of("unused"))


def question(grid: Grid, node: int) -> Message:
    return grid.create_message(RecordDict({"ask": ConfigRecord()}), "query", node, group_id="4")


def test_it_is_a_grid_with_one_node_for_each_client(grid: InProcessGrid) -> None:
    assert isinstance(grid, Grid)
    assert list(grid.get_node_ids()) == [2, 3, 4]
    assert [info.node_id for info in grid.get_nodes()] == [2, 3, 4]
    grid.set_run(grid.run)
    assert grid.run.run_id == 1


def test_every_message_gets_the_reply_of_its_own_node(grid: InProcessGrid) -> None:
    replies = list(grid.send_and_receive([question(grid, node) for node in (4, 2, 3)]))
    assert [reply.metadata.src_node_id for reply in replies] == [4, 2, 3]
    assert [reply.content["site"]["number"] for reply in replies] == [2, 0, 1]
    assert {reply.metadata.group_id for reply in replies} == {"4"}


def test_replies_are_pulled_once_and_by_their_own_id(grid: InProcessGrid) -> None:
    ids = list(grid.push_messages([question(grid, 2), question(grid, 3)]))
    assert len(set(ids)) == 2
    (second,) = grid.pull_messages([ids[1]])
    more = list(grid.push_messages([question(grid, 4)]))
    assert not set(more) & set(ids)
    assert list(grid.pull_messages([ids[1]])) == []
    (first,) = grid.pull_messages([ids[0]])
    assert [m.metadata.src_node_id for m in (first, second)] == [2, 3]


def test_a_crash_of_a_client_is_its_reply() -> None:
    settings = settings_of("unused")
    app = fake_app(tamper=lambda client, message, reply: None if client == 1 else reply)
    grid = fake_grid(settings, app)
    replies = list(grid.send_and_receive([question(grid, node) for node in (2, 3, 4)]))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.reason == "RuntimeError: this client crashed"


def test_the_listener_hears_each_message_before_it_is_answered() -> None:
    heard: list[tuple[str, int]] = []
    grid = InProcessGrid(
        fake_app(),
        2,
        flatten(settings_of("unused")),
        lambda kind, client: heard.append((kind, client)),
    )
    list(grid.send_and_receive([question(grid, FIRST_CLIENT_NODE + 1)]))
    assert heard == [("query", 1)]
