"""Who comes late, goes, comes back or changes, and rounds that need not wait for everybody."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from core.errors import BouquetError
from journal.run_folder import RunFolder
from server.rounds import run_rounds
from settings.run import RunSettings
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.fake_clients import Tamper, fake_app, fake_grid, settings_of


class ChangingGrid(InProcessGrid):
    """Nodes are connected in the rounds that `connected` names; 0 is before round one."""

    connected: dict[int, list[int]]
    now = 0

    def get_node_ids(self) -> list[int]:
        clients = self.connected.get(self.now, [0, 1, 2])
        return [FIRST_CLIENT_NODE + client for client in clients]

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train":
                self.now = int(message.metadata.group_id)
        return super().push_messages(messages)


def play(
    settings: RunSettings, connected: dict[int, list[int]], tamper: Tamper | None = None
) -> list[Any]:
    app = fake_app(tamper=tamper) if tamper else fake_app()
    grid = fake_grid(settings, app)
    grid.__class__ = ChangingGrid
    grid.connected = connected  # type: ignore[attr-defined]
    run_rounds(grid, settings)
    return RunFolder(Path(settings.output)).rounds()[1:]


def taking_part(records: list[Any]) -> list[list[int]]:
    return [[int(client["client"][-2:]) for client in r["clients"]] for r in records]


def test_a_site_that_comes_late_takes_part_from_the_round_after_its_answer(
    tmp_path: Path,
) -> None:
    settings = settings_of(tmp_path / "run", rounds=5)
    records = play(settings, {0: [0, 1], 1: [0, 1]})
    # It connects during round 2, is asked before round 3 and has answered before round 4.
    assert taking_part(records) == [[0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_a_site_that_is_away_is_not_waited_for(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", rounds=5)
    records = play(settings, {1: [0, 2], 2: [0, 2]})
    assert taking_part(records) == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert all(record["failures"] == [] for record in records)


def test_a_latecomer_whose_rank_the_method_cannot_take_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(tmp_path / "run", rounds=4, strategy__name="fedavg", lora__rank="2,2,1")
    records = play(settings, {0: [0, 1]})
    assert taking_part(records) == [[0, 1]] * 4
    assert "event=left-out client=client-02" in caplog.text
    assert "needs one rank for all clients" in caplog.text


def test_a_latecomer_with_another_base_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other(client: int, message: Message, reply: Message) -> Message:
        if client == 2 and "site" in reply.content:
            reply.content["site"]["base"] = "other"  # type: ignore[index]
        return reply

    records = play(settings_of(tmp_path / "run", rounds=4), {0: [0, 1]}, other)
    assert taking_part(records) == [[0, 1]] * 4
    assert "has base model other, the run's is fake-base" in caplog.text


def test_a_site_that_changed_its_rank_is_refused_once_and_then_known(tmp_path: Path) -> None:
    rank = {"now": 1}

    def raised(client: int, message: Message, reply: Message) -> Message:
        if client == 2 and "site" in reply.content:
            reply.content["site"]["rank"] = rank["now"]  # type: ignore[index]
            rank["now"] = 2  # from the second question on, until it answers with rank 1 again
        return reply

    settings = settings_of(tmp_path / "run", rounds=4, lora__rank="3,2,2")
    records = play(settings, {}, raised)
    assert taking_part(records) == [[0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    (failure,) = records[0]["failures"]
    assert failure["client"] == "client-02"


def test_nobody_connected_any_more_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "run", rounds=3, clients__timeout_seconds=0.2)
    with pytest.raises(BouquetError, match=r"no client is connected any more.*start it again"):
        play(settings, {1: []})
    assert RunFolder(tmp_path / "run").rounds()[-1]["round"] == 1


def test_over_selection_takes_those_that_answer_first(tmp_path: Path) -> None:
    values: dict[str, Any] = {"rounds": 3, "clients__fraction": 0.5}
    settings = settings_of(tmp_path / "run", clients__over_selection=1.3, **values)
    records = play(settings, {})
    for record in records:
        assert len(record["clients"]) == 2  # half of three, rounded up
        assert len(record["spare"]) == 1  # of three that were asked
        assert record["failures"] == []
        assert record["bytes_down"] >= sum(client["bytes_down"] for client in record["clients"])


def test_over_selection_replaces_who_fails(tmp_path: Path) -> None:
    def crash(client: int, message: Message, reply: Message) -> Message | None:
        return None if client == 0 and "adapter" in reply.content else reply

    settings = settings_of(
        tmp_path / "run", rounds=2, clients__fraction=0.5, clients__over_selection=1.5
    )
    records = play(settings, {}, crash)
    assert taking_part(records) == [[1, 2], [1, 2]]
    assert [record["spare"] for record in records] == [[], []]
    assert [f["client"] for f in records[0]["failures"]] == ["client-00"]


def test_who_fails_an_evaluation_is_named_in_the_log(tmp_path: Path) -> None:
    def crash(client: int, message: Message, reply: Message) -> Message | None:
        evaluates = "metrics" in reply.content and "adapter" not in reply.content
        return None if client == 1 and evaluates else reply

    settings = settings_of(tmp_path / "run", rounds=1, evaluate__clients=True)
    (record,) = play(settings, {}, crash)
    (failure,) = record["evaluation_failures"]
    assert failure["client"] == "client-01"
    assert "this client crashed" in failure["reason"]
    assert record["failures"] == []
    assert len(record["clients"]) == 3


class LosingGrid(InProcessGrid):
    """The first answer of client 1 to a query is lost."""

    lost = False

    def pull_messages(self, message_ids: Any) -> Any:
        came = list(super().pull_messages(message_ids))
        for answer in came:
            if answer.metadata.src_node_id == FIRST_CLIENT_NODE + 1 and not self.lost:
                self.lost = True
                return [other for other in came if other is not answer]
        return came


def test_a_site_whose_answer_was_lost_is_asked_again_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.attendance.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("server.attendance.POLL_SECONDS", 0.01)
    settings = settings_of(tmp_path / "run", rounds=1, clients__min_replies=3)
    grid = fake_grid(settings)
    grid.__class__ = LosingGrid
    with caplog.at_level("INFO"):
        run_rounds(grid, settings)
    (record,) = RunFolder(Path(settings.output)).rounds()[1:]
    assert taking_part([record]) == [[0, 1, 2]]
    said = "waiting for 1 of 3 sites, since 0 s; here: client-00, client-02; silent: node 3"
    assert said in caplog.text
