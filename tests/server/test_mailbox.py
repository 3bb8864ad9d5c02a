"""Waits end, late answers are counted, and nobody's answer is taken for another's."""

import itertools
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from server.mailbox import Look, Mailbox
from simulations.grid import InProcessGrid
from tests.fake_clients import fake_app


class SlowGrid(InProcessGrid):
    """Answers are handed out when the test says so, to whatever message it says."""

    def __init__(self) -> None:
        super().__init__(fake_app(), 3, {})
        self.names = itertools.count()
        self.pushed: dict[str, Message] = {}
        self.ready: list[str] = []
        self.asked: list[list[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        named = {f"m{next(self.names)}": message for message in messages}
        self.pushed |= named
        return list(named)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked.append(list(message_ids))
        came, self.ready = self.ready, []
        return [self.answer_to(name) for name in came]

    def answer_to(self, name: str) -> Message:
        answer = Message(RecordDict(), reply_to=next(iter(self.pushed.values())))
        answer.metadata.__dict__["_reply_to_message_id"] = name
        return answer


@pytest.fixture
def grid() -> SlowGrid:
    return SlowGrid()


def letters(count: int) -> list[Message]:
    return [
        Message(RecordDict({"ask": ConfigRecord()}), dst_node_id=2 + n, message_type="query")
        for n in range(count)
    ]


def gone(grid: SlowGrid, name: str) -> Message:
    """What Flower says of an answer that it has no more."""
    answer: Any = Message(Error(4, "gone"), reply_to=next(iter(grid.pushed.values())))
    answer.metadata.__dict__["_reply_to_message_id"] = name
    return answer  # type: ignore[no-any-return]


def questions(answers: Iterable[Message]) -> list[str]:
    return [answer.metadata.reply_to_message_id for answer in answers]


def test_answers_are_yielded_as_they_come(grid: SlowGrid) -> None:
    answers = Mailbox(grid).exchange(letters(3), 60.0)
    grid.ready = ["m2"]
    assert questions([next(answers)]) == ["m2"]
    grid.ready = ["m0", "m1"]
    assert questions(answers) == ["m0", "m1"]
    assert grid.asked == [["m0", "m1", "m2"], ["m0", "m1"]]


def test_a_silent_node_does_not_hold_the_wait_beyond_its_deadline(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    grid.ready = ["m1"]
    assert questions(mailbox.exchange(letters(2), 0.05)) == ["m1"]
    assert not mailbox.strays


def test_what_comes_after_its_wait_is_late_and_not_taken_for_another(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    list(mailbox.exchange(letters(2), 0.0))
    grid.ready = ["m0", "m3"]
    assert questions(mailbox.exchange(letters(2), 0.0)) == ["m3"]
    assert mailbox.strays == {"late": 1}
    assert grid.asked[-1] == ["m0", "m1", "m2", "m3"]


def test_a_second_answer_and_one_to_nothing_are_counted(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    grid.ready = ["m0", "m0", "elsewhere"]
    assert questions(mailbox.exchange(letters(2), 0.0)) == ["m0"]
    assert mailbox.strays == {"duplicate": 1, "foreign": 1}


def test_a_caller_may_stop_early(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    grid.ready = ["m1"]
    for answer in mailbox.exchange(letters(3), 60.0):
        assert questions([answer]) == ["m1"]
        break
    grid.ready = ["m0"]
    assert mailbox.answers() == []
    assert mailbox.strays == {"late": 1}


def test_answers_asked_for_later_are_handed_out_once_whenever_they_come(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    mailbox.ask_later(letters(2))
    assert mailbox.answers() == []
    grid.ready = ["m1", "m2"]
    assert questions(mailbox.exchange(letters(1), 0.0)) == ["m2"]
    assert questions(mailbox.answers()) == ["m1"]
    assert mailbox.answers() == []
    grid.ready = ["m0"]
    assert questions(mailbox.answers()) == ["m0"]
    assert not mailbox.strays


def test_who_is_silent_for_long_is_asked_once_more(
    grid: SlowGrid, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.mailbox.SILENT_AT_LEAST_SECONDS", 0.01)
    mailbox, looks = Mailbox(grid), []

    def look(look: Look) -> None:
        looks.append(look)
        if look.again:
            grid.ready = ["m2"]  # the copy: the first answer was lost

    grid.ready = ["m0"]
    answers = mailbox.exchange(letters(2), 60.0, look=look)
    assert questions(answers) == ["m0", "m2"]
    assert [message.metadata.dst_node_id for message in grid.pushed.values()] == [2, 3, 3]
    assert (looks[0].heard, looks[0].silent, looks[-2].again) == ({2}, {3}, {3})
    assert (looks[-1].heard, looks[-1].silent, looks[-1].again) == ({2, 3}, set(), set())
    assert mailbox.strays == {"lost": 1}
    assert "event=asked-again nodes=3" in caplog.text
    grid.ready = ["m1"]  # it was not lost after all
    mailbox.answers()
    assert mailbox.strays == {"lost": 1, "late": 1}


def test_of_two_answers_the_first_counts(grid: SlowGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.mailbox.SILENT_AT_LEAST_SECONDS", 0.01)
    mailbox = Mailbox(grid)

    def look(look: Look) -> None:
        if look.again:
            grid.ready = ["m1"]

    grid.ready = ["m0"]
    assert questions(mailbox.exchange(letters(2), 60.0, look=look)) == ["m0", "m1"]
    grid.ready = ["m2"]
    mailbox.answers()
    assert mailbox.strays == {"late": 1}


def test_where_nobody_answers_all_are_asked_after_a_third_of_the_wait(grid: SlowGrid) -> None:
    looks: list[Look] = []
    assert list(Mailbox(grid).exchange(letters(2), 0.6, look=looks.append)) == []
    assert len(grid.pushed) == 4
    first = next(look for look in looks if look.again)
    assert first.seconds >= 0.2


def test_what_the_superlink_has_lost_is_asked_for_at_once(grid: SlowGrid) -> None:
    answer_to = grid.answer_to

    def lost(name: str) -> Message:
        if name != "m0":
            return answer_to(name)
        grid.ready = ["m1"]
        return gone(grid, name)

    grid.answer_to = lost  # type: ignore[method-assign]
    grid.ready = ["m0"]
    mailbox = Mailbox(grid)
    assert questions(mailbox.exchange(letters(1), 60.0)) == ["m1"]
    assert mailbox.strays == {"lost": 1}


@pytest.mark.parametrize(
    ("together", "strays"),
    [
        (["m1", "m2"], {"duplicate": 1}),
        (["m1 gone", "m2"], {"lost": 1}),
        (["m2", "m1 gone"], {"lost": 1}),
        (["m1 gone"], {"lost": 1}),
        (["m2 gone"], {"lost": 1}),
    ],
)
def test_of_what_was_asked_twice_one_answer_counts_and_a_loss_is_not_it(
    together: list[str], strays: dict[str, int], grid: SlowGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.mailbox.SILENT_AT_LEAST_SECONDS", 0.01)
    answer_to = grid.answer_to

    def answer(name: str) -> Message:
        named, *is_gone = name.split()
        return gone(grid, named) if is_gone else answer_to(named)

    monkeypatch.setattr(grid, "answer_to", answer)
    mailbox, ready = Mailbox(grid), [together, ["m2" if together == ["m1 gone"] else "m1"]]

    def look(look: Look) -> None:
        if look.again and ready:
            grid.ready = ready.pop(0)

    grid.ready = ["m0"]
    answers = list(mailbox.exchange(letters(2), 60.0, look=look))
    assert len(answers) == 2
    assert not any(answer.has_error() for answer in answers)
    assert mailbox.strays == strays


def test_a_message_that_could_not_be_sent_is_not_waited_for(grid: SlowGrid) -> None:
    push: Any = grid.push_messages
    grid.push_messages = lambda messages: [None, *list(push(messages))[1:]]  # type: ignore
    grid.ready = ["m1"]
    assert questions(Mailbox(grid).exchange(letters(2), 60.0)) == ["m1"]


def test_a_superlink_out_of_breath_is_asked_again(
    grid: SlowGrid, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("server.mailbox.time.sleep", pauses.append)
    pull, failures = grid.pull_messages, iter([True, True, False])

    def out_of_breath(message_ids: Iterable[str]) -> list[Message]:
        if next(failures):
            raise httpx.ReadError("database is locked")
        return pull(message_ids)

    monkeypatch.setattr(grid, "pull_messages", out_of_breath)
    grid.ready = ["m0"]
    assert questions(Mailbox(grid).exchange(letters(1), 60.0)) == ["m0"]
    assert pauses == [1.0, 2.0]
    assert "event=superlink-failed" in caplog.text


@pytest.mark.parametrize(("error", "times"), [(httpx.ReadError("gone"), 5), (ValueError("x"), 1)])
def test_what_does_not_pass_is_an_error(
    error: Exception, times: int, grid: SlowGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.mailbox.time.sleep", lambda seconds: None)
    asked: list[int] = []

    def gone() -> list[int]:
        asked.append(1)
        raise error

    monkeypatch.setattr(grid, "get_node_ids", gone)
    with pytest.raises(type(error)):
        Mailbox(grid).node_ids()
    assert len(asked) == times


def test_staggered_messages_go_out_one_by_one(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    pushed: list[int] = []

    def look(look: Look) -> None:
        pushed.append(len(grid.pushed))
        if pushed[-2:] == [1, 2]:
            grid.ready = ["m0", "m1"]  # both have answered: the third is asked at once

    answers = mailbox.exchange(letters(3), 60.0, look=look, stagger=0.2)
    assert questions([next(answers), next(answers)]) == ["m0", "m1"]
    assert set(pushed) == {1, 2}
    grid.ready = ["m2"]
    assert questions(answers) == ["m2"]
    assert len(grid.pushed) == 3
    assert not mailbox.strays


def test_who_answers_a_staggered_message_ends_the_asking(grid: SlowGrid) -> None:
    answers = Mailbox(grid).exchange(letters(3), 60.0, stagger=60.0)
    grid.ready = ["m0"]
    assert questions([next(answers)]) == ["m0"]
    assert len(grid.pushed) == 1


def test_nobody_is_asked_again_when_no_answer_can_come_in_time(grid: SlowGrid) -> None:
    """Flower would take so short a life of a message for none, and give it an hour."""
    mailbox = Mailbox(grid)

    def pull(message_ids: Iterable[str]) -> list[Message]:
        return [gone(grid, name) for name in message_ids if name == "m0"]

    grid.pull_messages = pull  # type: ignore[method-assign]
    (answer,) = mailbox.exchange(letters(1), 0.0)
    assert answer.has_error()
    assert len(grid.pushed) == 1
    assert mailbox.strays == {"lost": 1}


def test_no_two_messages_have_a_part_in_common_that_a_site_could_guess(grid: SlowGrid) -> None:
    mailbox = Mailbox(grid)
    for _ in range(2):
        mailbox.ask_later(letters(2))
    contents = [message.content.object_id for message in grid.pushed.values()]
    assert len(set(contents)) == len(contents) == 4


def test_who_fails_at_once_shows_not_how_long_an_answer_takes(
    grid: SlowGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.mailbox.SILENT_AT_LEAST_SECONDS", 0.01)
    answer_to = grid.answer_to

    def failed(name: str) -> Message:
        answer = answer_to(name)
        answer.content["failure"] = ConfigRecord({"reason": "no memory"})
        return answer

    monkeypatch.setattr(grid, "answer_to", failed)
    grid.ready = ["m0", "m1"]
    answers = Mailbox(grid).exchange(letters(3), 0.6)
    assert questions(answers) == ["m0", "m1"]
    times = [message.metadata.created_at for message in grid.pushed.values()]
    assert times[3] - times[0] >= 0.2
