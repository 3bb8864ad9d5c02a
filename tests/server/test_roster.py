"""Who takes part: agreement on the base, order, names, and everybody left out by name."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from core.errors import UsageError
from server.attendance import call_roster
from server.mailbox import Mailbox
from server.names import REGISTRY
from server.roster import Roster, Rules, roster_after
from server.sampling import sample_cohort
from tests.fake_clients import BASE, SHAPES, fake_app, fake_grid, settings_of


def call(tamper: Any = None, clients: int = 3, data: dict[str, str] | None = None) -> Roster:
    settings = settings_of("unused", clients__count=clients)
    app = fake_app(tamper=tamper) if tamper else fake_app()
    return call_roster(Mailbox(fake_grid(settings, app)), 1, 5.0, data=data)


def with_data(*hashes: str) -> Any:
    """Clients that say what data they have."""

    def say(client: int, message: Message, reply: Message) -> Message:
        site_of(reply)["data"] = hashes[client]
        return reply

    return say


def site_of(reply: Message) -> Any:
    return reply.content["site"]


def test_everyone_who_answers_is_there_in_order() -> None:
    roster = call()
    assert list(roster.ranks.items()) == [("client-00", 3), ("client-01", 2), ("client-02", 1)]
    assert (roster.base, dict(roster.shapes)) == (BASE, SHAPES)
    assert [member.num_examples for member in roster.members] == [10, 20, 30]
    assert roster.left_out == {}


def test_the_order_is_the_clients_own_and_not_the_nodes() -> None:
    def reverse(client: int, message: Message, reply: Message) -> Message:
        site_of(reply)["number"] = 9 - client
        return reply

    assert list(call(reverse).ranks) == ["client-02", "client-01", "client-00"]


def test_who_has_another_base_is_left_out_by_name() -> None:
    def other(client: int, message: Message, reply: Message) -> Message:
        if client == 1:
            site_of(reply)["base"] = "other"
        return reply

    roster = call(other)
    assert list(roster.ranks) == ["client-00", "client-02"]
    assert roster.left_out == {"client-01": "has base model other, the run's is fake-base"}


def test_who_has_another_chat_template_is_left_out_by_name() -> None:
    def say(*hashes: str) -> Any:
        def tamper(client: int, message: Message, reply: Message) -> Message:
            site_of(reply)["chat-template"] = hashes[client]
            return reply

        return tamper

    roster = call(say("aa", "bb", "aa"))
    assert (list(roster.ranks), roster.template) == (["client-00", "client-02"], "aa")
    assert roster.left_out == {
        "client-01": "has another chat template (hash bb, the run's is hash aa): "
        "data.chat-template-file must hold the same at every site"
    }
    assert "(no file, the run's is hash aa)" in call(say("aa", "aa", "")).left_out["client-02"]


def test_who_has_other_shapes_is_left_out() -> None:
    def other(client: int, message: Message, reply: Message) -> Message:
        if client == 2:
            site_of(reply)["rows"] = [7, 7, 7]
        return reply

    assert list(call(other).ranks) == ["client-00", "client-01"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "rank must be a whole number from 1 to 10,000,000; got 0"),
        ({"rank": 5}, "rank 5 does not fit modules of smallest side 4"),
        ({"modules": ["one"]}, "it names 1 modules, and rows and columns of 3, 3"),
        ({"number": "first"}, "number must be a whole number from 0 to 1,000,000,000; got 'first'"),
        ({"modules": [], "rows": [], "columns": []}, "it names no module that it would train"),
        ({"chat-template": "{{ x }}"}, "chat-template must be a printable text of at most 64"),
        ({"data": "not a hash"}, "like [0-9a-f]{0,64}; got 'not a hash'"),
        ({"data": "f" * 65}, "ffff' of 65 characters"),
        ({"data": 7}, "like [0-9a-f]{0,64}; got 7"),
        ({"data": ["f"]}, "like [0-9a-f]{0,64}; got a list of 1"),
    ],
)
def test_an_answer_that_makes_no_sense_is_left_out(change: dict[str, Any], reason: str) -> None:
    def nonsense(client: int, message: Message, reply: Message) -> Message:
        if client == 0:
            site_of(reply).update(change)
        return reply

    roster = call(nonsense)
    assert list(roster.ranks) == ["client-01", "client-02"]
    assert reason in roster.left_out["node 2"]


def test_an_answer_without_a_site_is_left_out() -> None:
    def empty(client: int, message: Message, reply: Message) -> Message:
        return Message(RecordDict(), reply_to=message) if client == 0 else reply

    assert list(call(empty).ranks) == ["client-01", "client-02"]


def test_clients_of_one_name_are_told_apart() -> None:
    def same(client: int, message: Message, reply: Message) -> Message:
        site_of(reply)["client"] = "oslo" if client < 2 else "bergen"
        return reply

    assert list(call(same).ranks) == ["oslo@2", "oslo@3", "bergen"]


def test_no_word_of_a_client_is_obeyed_by_a_terminal() -> None:
    escape = "\x1b[2J\u202e"

    def rude(client: int, message: Message, reply: Message) -> Message:
        if client < 2:
            who = ("oslo", f"oslo{escape}")[client]
            words = {"client": who, "reason": f"bad{escape}" + "!" * 10_000}
            return Message(RecordDict({"failure": ConfigRecord(words)}), reply_to=message)
        return reply

    roster = call(rude)
    assert list(roster.left_out) == ["oslo@2", "node 3"]
    for reason in roster.left_out.values():
        assert reason.startswith(r"the client reports: bad\x1b[2J\u202e!!!")
        assert len(reason) < 600


def test_who_fails_under_the_name_of_another_is_not_taken_for_it() -> None:
    def pretend(client: int, message: Message, reply: Message) -> Message:
        words = {"client": "client-01", "reason": "gone"}
        told: Any = ConfigRecord(words)
        failure = RecordDict({"failure": told})
        return Message(failure, reply_to=message) if client == 2 else reply

    roster = call(pretend)
    assert list(roster.ranks) == ["client-00", "client-01"]
    assert roster.left_out == {"client-01@4": "the client reports: gone"}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        r"a\b",
        "..",
        "../../etc",
        "a\x1b[2J",
        "a\nb",
        "a\u202eb",
        "oslo@3",
        " a",
        "a" * 41,
        "Oslo",
        "oslo bergen",
        7,
    ],
)
def test_a_name_that_is_none_leaves_its_client_out(name: Any) -> None:
    def called(client: int, message: Message, reply: Message) -> Message:
        if client == 0:
            site_of(reply)["client"] = name
        return reply

    roster = call(called)
    assert list(roster.ranks) == ["client-01", "client-02"]
    assert "client must be a printable text of at most 40 characters" in roster.left_out["node 2"]


def test_nobody_is_an_error_with_the_reasons() -> None:
    def crash(client: int, message: Message, reply: Message) -> None:
        return None

    with pytest.raises(
        UsageError, match=r"no client can take part: node 2: the client failed: .*crashed"
    ):
        call(crash)


def test_waiting_for_clients_ends() -> None:
    with pytest.raises(UsageError, match=r"3 clients connected within 0 s; 4 needed"):
        call_roster(Mailbox(fake_grid(settings_of("unused"))), 4, 0.0)


def test_sampling_is_fair_and_depends_on_seed_and_round_alone() -> None:
    roster = list(range(10))
    assert sample_cohort(roster, 0.3, 1, 1) == sample_cohort(roster, 0.3, 1, 1)
    cohorts = [sample_cohort(roster, 0.3, 1, server_round) for server_round in range(1, 401)]
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in cohorts)
    counts = [sum(client in cohort for cohort in cohorts) for client in roster]
    assert all(80 < count < 160 for count in counts)  # expected 120, standard deviation 9
    assert cohorts != [
        sample_cohort(roster, 0.3, 2, server_round) for server_round in range(1, 401)
    ]


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 10), (0.1, 1), (0.11, 2), (0.001, 1)])
def test_the_cohort_is_the_fraction_rounded_up(fraction: float, size: int) -> None:
    assert len(sample_cohort(list(range(10)), fraction, 0, 1)) == size


def test_who_has_other_data_than_it_began_with_is_left_out_by_name() -> None:
    began = call(with_data("aa", "bb", "cc")).data
    assert began == {"client-00": "aa", "client-01": "bb", "client-02": "cc"}
    roster = call(with_data("aa", "b0", "cc"), data=dict(began))
    assert list(roster.ranks) == ["client-00", "client-02"]
    assert roster.left_out == {
        "client-01": "its data have changed since the run began (hash b0, before bb): bring them "
        "back, or begin a new run"
    }
    assert roster.data == began


def test_a_client_of_which_no_data_are_known_takes_part() -> None:
    roster = call(with_data("aa", "bb", ""), data={"client-00": "aa", "client-01": ""})
    assert list(roster.ranks) == ["client-00", "client-01", "client-02"]
    assert roster.data == {"client-00": "aa", "client-01": "bb", "client-02": ""}


def test_where_all_have_other_data_nobody_can_take_part() -> None:
    expected = r"no client can take part: client-00: its data have changed since .*, client-01: its"
    with pytest.raises(UsageError, match=expected):
        call(with_data("a", "b", "c"), data={f"client-0{k}": "d" for k in range(3)})


def with_labels(*labels: Any) -> Any:
    """Clients with a head of three classes, that say which these are."""

    def say(client: int, message: Message, reply: Message) -> Message:
        site_of(reply).update({"head": ["score.weight"], "head-shapes": ["3x8"]})
        site_of(reply)["labels"] = labels[client]
        return reply

    return say


def test_the_labels_are_those_that_the_clients_agree_on() -> None:
    labels = ["so, so", "1", "\x1b[2J"]
    roster = call(with_labels(labels, labels, labels))
    assert roster.labels == tuple(labels)
    assert list(roster.ranks) == ["client-00", "client-01", "client-02"]
    assert call().labels == ()


def test_who_names_other_labels_is_left_out() -> None:
    roster = call(with_labels(["a", "b", "c"], ["b", "a", "c"], ["a", "b", "c"]))
    assert roster.labels == ("a", "b", "c")
    assert roster.left_out == {
        "client-01": "has another classification head: data.labels must be the same"
    }


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a", "b", "c", "d"], "no list of at most 3"),
        ("a,b", "no list of at most 3"),
        ([1, 2], "not texts of at most 1000 characters"),
        (["a", "b" * 1001], "not texts of at most 1000 characters"),
        (["a"], "not at least two, each once and none empty"),
        (["a", "a"], "not at least two, each once and none empty"),
        (["a", ""], "not at least two, each once and none empty"),
        (["1", "2.0"], "not at least two, each once and none empty"),
        (["a\x7f,", "b"], "not at least two, each once and none empty"),
    ],
)
def test_labels_that_are_none_leave_their_client_out(labels: Any, reason: str) -> None:
    honest = ["[" * 1000, "b"]  # a text with brackets is no list, however deep
    roster = call(with_labels(labels, honest, honest))
    assert list(roster.ranks) == ["client-01", "client-02"]
    assert roster.labels == tuple(honest)
    assert reason in roster.left_out["node 2"]


def test_a_site_is_called_what_its_key_is_registered_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "oslo.node").write_text("2\n")
    (tmp_path / "bergen.node").write_text("3\n")
    (tmp_path / "damaged.node").write_text("x\n")
    monkeypatch.setenv(REGISTRY, str(tmp_path))

    def claim(client: int, message: Message, reply: Message) -> Message:
        site_of(reply)["client"] = ["oslo", "oslo", "tromso"][client]  # bergen calls itself oslo
        return reply

    roster = call(claim)
    assert sorted(roster.ranks) == ["bergen", "oslo"]
    (reason,) = roster.left_out.values()
    assert "node 4, which calls itself tromso, is not registered" in reason
    assert "event=another-name node=3 registered=bergen claims=oslo" in caplog.text
    assert "event=registry-damaged" in caplog.text


def test_who_has_too_few_examples_is_left_out() -> None:
    settings = settings_of("unused")
    roster = call_roster(Mailbox(fake_grid(settings)), 1, 5.0, rules=Rules(min_examples=11))
    assert list(roster.ranks) == ["client-01", "client-02"]
    assert roster.left_out == {"client-00": "has 10 training examples; clients.min-examples is 11"}


def test_a_new_key_takes_over_the_name_of_the_one_that_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REGISTRY, str(tmp_path))
    (tmp_path / "client-00.node").write_text("2\n")
    (tmp_path / "client-01.node").write_text("3\n")
    answers: list[Message] = []

    def keep(client: int, message: Message, reply: Message) -> Message:
        answers.append(reply)
        return reply

    before = call(keep)
    assert {member.name: member.node_id for member in before.members} == {
        "client-00": 2,
        "client-01": 3,
    }
    (tmp_path / "client-01.node").write_text("4\n")
    site_of(answers[2])["data"] = site_of(answers[1])["data"]  # the same site
    after = roster_after(answers[2:], before)
    assert {member.name: member.node_id for member in after.members} == {
        "client-00": 2,
        "client-01": 4,
    }
