"""Asking who is there: who cannot take part ends no wait for others, and wins nothing by a tie."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from core.errors import UsageError
from journal.run_folder import RunFolder
from server.attendance import ask_principal, call_roster
from server.mailbox import Mailbox
from server.names import REGISTRY
from server.roster import Roster, Rules, Told, roster_after
from server.rounds import run_rounds
from server.waiting import Waiting
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.adapter_generators import make_adapter
from tests.fake_clients import SHAPES, Tamper, fake_app, fake_grid, settings_of
from wire.codec import pack
from wire.records import to_record


class FillingGrid(InProcessGrid):
    """At each look one node more is connected."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return list(super().get_node_ids())[: self.looks]


@pytest.fixture
def sites_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that may come later, as at a SuperLink."""
    monkeypatch.setattr(Mailbox, "is_closed", False)
    monkeypatch.setattr("server.attendance.POLL_SECONDS", 0.01)


def changed(client: int, **fields: Any) -> Tamper:
    """Of this client alone, the answer to a query has other fields."""

    def tamper(number: int, message: Message, reply: Message) -> Message:
        if number == client and "site" in reply.content:
            told = {name.replace("_", "-"): value for name, value in fields.items()}
            reply.content["site"].update(told)  # type: ignore[union-attr]
        return reply

    return tamper


def call(
    tamper: Tamper,
    clients: int = 3,
    at_least: int = 1,
    seconds: float = 5.0,
    grid: type[InProcessGrid] = InProcessGrid,
    **more: Any,
) -> Roster:
    ready = fake_grid(settings_of("unused", clients__count=clients), fake_app(tamper=tamper))
    ready.__class__ = grid
    return call_roster(Mailbox(ready), at_least, seconds, **more)


@pytest.mark.usefixtures("sites_elsewhere")
@pytest.mark.parametrize("fields", [{"rank": float("inf")}, {"num_examples": 3}, {"modules": []}])
def test_a_stranger_who_comes_first_does_not_end_the_wait(fields: dict[str, Any]) -> None:
    looks: list[Waiting] = []
    roster = call(
        changed(0, **fields), 2, grid=FillingGrid, tell=looks.append, rules=Rules(min_examples=10)
    )
    assert list(roster.ranks) == ["client-01"]
    assert len(roster.left_out) == 1
    (name,) = looks[0].left_out
    assert (looks[0].here, looks[0].more) == ((), 1)
    assert f"left out: {name} (" in str(looks[0])


@pytest.mark.usefixtures("sites_elsewhere")
def test_nobody_but_a_stranger_by_the_deadline_is_told_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"no client can take part: .*has 10 training examples"):
        call(changed(9), 1, seconds=0.05, rules=Rules(min_examples=11))
    with pytest.raises(
        UsageError, match=r"2 of 3 clients can take part; 3 needed .*client-00: has 10 training"
    ):
        call(changed(9), at_least=3, seconds=0.05, rules=Rules(min_examples=11))


def test_who_is_left_out_does_not_count_among_those_that_a_run_waits_for() -> None:
    with pytest.raises(UsageError, match=r"2 of 3 clients can take part; 3 needed"):
        call(changed(1, base="other"), at_least=3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base": "other"}, r"base model other: client-00, base model fake-base: client-01"),
        ({"rows": [5, 5, 5]}, r"3 modules to adapt: client-00, .* \(they differ in .*6 x 8"),
        ({"chat_template": "aa"}, r"chat template hash aa: client-00, chat template no file: "),
    ],
)
def test_a_tie_is_won_by_nobody(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=rf"2 kinds of sites are as many as each other.*{words}"):
        call(changed(0, **fields), 2)


@pytest.mark.usefixtures("sites_elsewhere")
def test_who_cannot_take_part_is_asked_again_for_its_owner_may_mend_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.attendance.AGAIN_SECONDS", 0.05)
    bases = ["other", "other"]

    def mended(number: int, message: Message, reply: Message) -> Message:
        if number == 0 and bases:
            return changed(0, base=bases.pop())(number, message, reply) or reply
        return reply

    roster = call(mended, at_least=3)
    assert list(roster.ranks) == ["client-00", "client-01", "client-02"]
    assert (bases, roster.left_out) == ([], {})


@pytest.mark.usefixtures("sites_elsewhere")
def test_a_tie_is_told_while_it_is_waited_out() -> None:
    looks: list[Waiting] = []
    with pytest.raises(UsageError, match="2 kinds of sites"):
        call(changed(0, base="other"), 2, seconds=0.1, tell=looks.append)
    assert looks[-1].left_out == {
        "client-00": "base model other: as many sites have another",
        "client-01": "base model fake-base: as many sites have another",
    }


@pytest.mark.usefixtures("sites_elsewhere")
def test_who_comes_later_breaks_a_tie() -> None:
    roster = call(changed(0, base="other"), grid=FillingGrid, at_least=2)
    assert list(roster.ranks) == ["client-01", "client-02"]
    assert roster.left_out == {"client-00": "has base model other, the run's is fake-base"}


@pytest.mark.parametrize("method", ["fedavg", "ffa-lora", "fedex-lora"])
def test_one_odd_rank_does_not_end_a_run_of_a_method_that_needs_one(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(
        tmp_path / "run", rounds=1, strategy__name=method, lora__rank="2", clients__count=4
    )
    run_rounds(fake_grid(settings, fake_app(tamper=changed(0, rank=1))), settings)
    record = RunFolder(tmp_path / "run").rounds()[-1]
    assert [client["client"][-2:] for client in record["clients"]] == ["01", "02", "03"]
    assert "event=left-out client=client-00" in caplog.text
    assert f"trains rank 1, the run's is 2: {method} averages" in caplog.text


def test_a_rank_above_the_highest_is_left_out() -> None:
    roster = call(changed(9), rules=Rules(max_rank=2))
    assert roster.left_out == {"client-00": "trains rank 3; clients.max-rank is 2"}


def test_an_adapter_that_no_server_could_hold_is_not_believed() -> None:
    sides = {"rows": [10**7] * 3, "columns": [10**7] * 3, "rank": 10**6}
    (reason,) = call(changed(0, **sides)).left_out.values()
    assert reason == "an adapter of its rank has more than 10,000,000,000 values"


@pytest.mark.parametrize(
    "fields",
    [
        {"base": "other"},
        {"rows": [5, 5, 5]},
        {"chat_template": "aa"},
        {"rank": 1},
    ],
)
def test_a_run_that_goes_on_keeps_to_what_it_began_with(
    fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where more sites have something else than have what the run began with."""
    values: dict[str, Any] = {"strategy__name": "fedavg", "lora__rank": "2"}
    settings = settings_of(tmp_path / "run", rounds=1, **values)
    run_rounds(fake_grid(settings), settings)

    def others(number: int, message: Message, reply: Message) -> Message:
        return changed(number, **fields)(number, message, reply) if number < 2 else reply

    settings = settings_of(tmp_path / "run", rounds=2, resume=True, **values)
    run_rounds(fake_grid(settings, fake_app(tamper=others)), settings)
    record = RunFolder(tmp_path / "run").rounds()[-1]
    assert [client["client"] for client in record["clients"]] == ["client-02"]
    assert "event=left-out client=client-00" in caplog.text
    assert "event=left-out client=client-01" in caplog.text


def answers_of(tamper: Tamper) -> list[Message]:
    kept: list[Message] = []

    def keep(number: int, message: Message, reply: Message) -> Message:
        kept.append(told := tamper(number, message, reply) or reply)
        return told

    call(keep)
    return kept


def names(members: Iterable[Any]) -> list[str]:
    return [member.name for member in members]


def test_a_member_that_now_has_too_few_examples_is_one_no_more() -> None:
    before = Told(answers_of(changed(9))).roster()
    after = roster_after(answers_of(changed(1, num_examples=3)), before, Rules(min_examples=10))
    assert names(after.members) == ["client-00", "client-02"]
    assert after.left_out == {"client-01": "has 3 training examples; clients.min-examples is 10"}


def test_a_site_whose_key_is_removed_while_it_trains_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = tmp_path / "keys"
    registry.mkdir()
    for number in range(3):
        (registry / f"client-0{number}.node").write_text(f"{FIRST_CLIENT_NODE + number}\n")
    monkeypatch.setenv(REGISTRY, str(registry))

    def removed(number: int, message: Message, reply: Message) -> Message:
        if "adapter" in reply.content:  # remove-site.sh, while round 1 is under way
            (registry / "client-01.node").unlink(missing_ok=True)
        return reply

    settings = settings_of(tmp_path / "run", rounds=2)
    run_rounds(fake_grid(settings, fake_app(tamper=removed)), settings)
    first, second = RunFolder(tmp_path / "run").rounds()[1:]
    (failure,) = first["failures"]
    assert failure["client"] == "client-01"
    assert failure["reason"] == "its key was removed while it was at work"
    assert [each["client"] for each in second["clients"]] == ["client-00", "client-02"]
    assert second["failures"] == []


@pytest.mark.usefixtures("sites_elsewhere")
def test_a_tie_ends_when_the_site_that_made_it_goes() -> None:
    class LeavingGrid(FillingGrid):
        def get_node_ids(self) -> list[int]:
            self.looks += 1
            nodes = list(InProcessGrid.get_node_ids(self))
            return nodes[1:2] if self.looks > 4 else nodes[:2]

    roster = call(changed(0, base="other"), grid=LeavingGrid)
    assert list(roster.ranks) == ["client-01"]


@pytest.mark.usefixtures("sites_elsewhere")
def test_who_has_gone_again_does_not_count_among_those_that_are_needed() -> None:
    class PassingGrid(FillingGrid):
        def get_node_ids(self) -> list[int]:
            nodes = super().get_node_ids()
            return nodes[:1] if self.looks < 5 else nodes[1:2]

    with pytest.raises(UsageError, match="1 client connected within"):
        call(changed(9), at_least=2, seconds=0.3, grid=PassingGrid)


@pytest.mark.usefixtures("sites_elsewhere")
def test_a_decomposition_of_another_rank_is_that_site_s_and_the_next_is_asked() -> None:
    def lower(number: int, message: Message, reply: Message) -> Message:
        if number == 0 and "principal" in reply.content:
            reply.content["principal"] = to_record(pack(make_adapter(7, SHAPES, 1, 1.0)))
        return reply

    mailbox = Mailbox(fake_grid(settings_of("unused"), fake_app(tamper=lower)))
    roster = call_roster(mailbox, 3, 5.0)
    assert ask_principal(mailbox, roster, 3, 5.0).rank == 3


def failing(*clients: int) -> Tamper:
    """The training of these clients fails."""

    def fails(number: int, message: Message, reply: Message) -> Message:
        if number in clients and "adapter" in reply.content:
            return Message(RecordDict(), reply_to=message)
        return reply

    return fails


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_where_too_few_replies_are_usable_others_are_asked(bad: int, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "rounds": 4,
        "clients__count": 4,
        "lora__rank": "2",
        "clients__fraction": 0.5,
        "clients__min_replies": 2,
    }
    settings = settings_of(tmp_path / "run", **values)
    run_rounds(fake_grid(settings, fake_app(tamper=failing(bad))), settings)
    records = RunFolder(tmp_path / "run").rounds()[1:]
    drawn = [record for record in records if record["failures"]]
    assert drawn
    for record in records:
        took_part = {each["client"] for each in record["clients"]}
        assert len(took_part) == 2
        assert f"client-0{bad}" not in took_part


@pytest.mark.usefixtures("sites_elsewhere")
def test_an_honest_site_that_is_away_is_waited_for_where_a_bad_one_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rounds.WAIT_SECONDS", 0.01)

    class AwayGrid(InProcessGrid):
        away = 0

        def get_node_ids(self) -> list[int]:
            nodes = list(super().get_node_ids())
            self.away -= self.away > 0
            return nodes[:2] if self.away else nodes

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            if not self.away and messages[0].metadata.message_type == "query":
                self.away = 20
            return list(super().push_messages(messages))

    settings = settings_of(tmp_path / "run", rounds=1, clients__min_replies=2)
    grid = fake_grid(settings, fake_app(tamper=failing(0)))
    grid.__class__ = AwayGrid
    run_rounds(grid, settings)
    record = RunFolder(tmp_path / "run").rounds()[-1]
    assert [each["client"] for each in record["clients"]] == ["client-01", "client-02"]
    assert [each["client"] for each in record["failures"]] == ["client-00"]
