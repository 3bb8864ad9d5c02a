"""Whole runs with strangers whose answers to a query or an evaluation are not what they should be.

The yardstick is a run in which the same clients crashed instead, as in test_hostile_round.py.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from journal.live_status import read_live_status
from journal.run_folder import RunFolder
from server.progress import LogObserver, observe_run
from server.roster import Roster
from server.rounds import run_rounds
from settings.keys import flatten
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.fake_clients import fake_app, settings_of
from tests.server.malformed_answers import MALFORMED_EVALUATIONS, MALFORMED_SITES
from tests.server.malformed_replies import MALFORMED_REPLIES
from tests.server.spoiling import Bad
from tests.server.test_hostile_round import HONEST, ORDERS, RANK, ROUNDS, left_behind

TABLES = {
    "query": MALFORMED_SITES,
    "asked again": MALFORMED_SITES,
    "evaluate": MALFORMED_EVALUATIONS,
}


class LeftOut(LogObserver):
    """Who was left out of the run, at its start and since."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        self.reasons |= roster.left_out

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        self.reasons |= left_out


def app_with(strangers: Sequence[Bad | None], when: str) -> ClientApp:
    """Two honest clients, then one for each of these; None crashes instead.

    when: `query`, where they spoil the first answer of all; `evaluate`; or `asked again`, where
    they crash in training and spoil what they answer when they are asked who they are once more.
    """
    asked: set[int] = set()

    def tamper(client: int, message: Message, reply: Message) -> Message | None:
        kind = message.metadata.message_type
        if client < HONEST:
            return reply
        if when == "asked again" and kind == "train":
            return None
        is_first = kind == "query" and client not in asked
        asked.add(client)
        if kind != ("query" if when == "asked again" else when) or (
            when == "asked again" and is_first
        ):
            return reply
        make = strangers[client - HONEST]
        if make is None:
            return reply if when == "asked again" else None
        bad: Any = make(reply.content, message)
        return Message(bad, reply_to=message)

    return fake_app(tamper=tamper)


def play(
    folder: Path,
    strangers: Sequence[Bad | None],
    when: str,
    grid: type[InProcessGrid] = InProcessGrid,
) -> dict[str, str]:
    """Run, and return who did not count, with the reasons: left out, or excluded."""
    settings = settings_of(
        folder,
        clients__count=HONEST + len(strangers),
        lora__rank=str(RANK),
        rounds=ROUNDS,
        evaluate__clients=when == "evaluate",
    )
    seen = LeftOut()
    with observe_run(seen):
        run_rounds(
            grid(app_with(strangers, when), settings.clients.count, flatten(settings)), settings
        )
    if when != "evaluate":
        return seen.reasons
    records = RunFolder(folder).rounds()
    assert all(len(record["client_held_out"]) == HONEST for record in records)
    return {
        failure["client"]: failure["reason"]
        for record in records
        for failure in record["evaluation_failures"]
    }


@cache
def without_them(count: int, when: str) -> dict[str, bytes | str]:
    """What is left of a run in which so many clients crashed."""
    with TemporaryDirectory() as folder:
        play(Path(folder, "run"), [None] * count, when)
        return left_behind(Path(folder, "run"))


def assert_only_the_log_knows(
    folder: Path, names: Sequence[str], when: str, reasons: dict[str, str]
) -> None:
    assert len(reasons) == len(names)
    for at, name in enumerate(names):
        number = HONEST + at
        node = FIRST_CLIENT_NODE + number
        called = (f"client-{number:02d}", f"node {node}", f"client-00@{node}")
        reason = next(reasons[who] for who in called if who in reasons)
        assert re.search(TABLES[when][name][1], reason), f"{name}: {reason}"
        assert reason.isprintable()
        assert len(reason) < 700
    assert left_behind(folder) == without_them(len(names), when)


ALONE = [(when, name) for when in ("query", "evaluate") for name in TABLES[when]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("when", "name"), ALONE)
def test_a_malformed_answer_leaves_no_trace_but_in_the_log(
    when: str, name: str, order: str, tmp_path: Path
) -> None:
    reasons = play(tmp_path / "run", [TABLES[when][name][0]], when, ORDERS[order])
    assert_only_the_log_knows(tmp_path / "run", [name], when, reasons)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("when", TABLES)
def test_all_malformed_answers_at_once_leave_no_trace_but_in_the_log(
    when: str, order: str, tmp_path: Path
) -> None:
    strangers = [bad for bad, _ in TABLES[when].values()]
    reasons = play(tmp_path / "run", strangers, when, ORDERS[order])
    assert_only_the_log_knows(tmp_path / "run", list(TABLES[when]), when, reasons)


@pytest.mark.parametrize("name", ["rank: inf", "a failure", "an error"])
def test_who_answers_badly_when_asked_again_is_not_shown_as_left_out(
    name: str, tmp_path: Path
) -> None:
    """What it said before stands, and it is asked to train again: its words say what happened."""
    settings = settings_of(tmp_path / "run", clients__count=3, lora__rank="2", rounds=2)
    states = []

    class States(LogObserver):
        def roster_changed(self, roster: Roster) -> None:
            found = read_live_status(tmp_path / "run")
            assert found is not None
            states.append(found.site("client-02"))

    with observe_run(States()):
        app = app_with([MALFORMED_SITES[name][0]], "asked again")
        run_rounds(InProcessGrid(app, 3, flatten(settings)), settings)
    again = [site for site in states if site.words and "what it said before stands" in site.words]
    assert again
    assert all(site.state == "failed" for site in again)


def honest(content: RecordDict, message: Message) -> RecordDict:
    return content


def test_an_honest_third_client_does_leave_a_trace(tmp_path: Path) -> None:
    """The yardstick measures something: who is not refused is in the result, or counted."""
    assert play(tmp_path / "asked", [honest], "query") == {}
    assert left_behind(tmp_path / "asked") != without_them(1, "query")
    with pytest.raises(AssertionError):
        play(tmp_path / "evaluated", [honest], "evaluate")


def test_the_corpus_has_the_size_that_the_page_names() -> None:
    tables = MALFORMED_SITES, MALFORMED_REPLIES, MALFORMED_EVALUATIONS
    sizes = [len(table) for table in tables]
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    assert f"{sizes[0]} answers to a query, {sizes[1]} to training, {sizes[2]} to an" in page
