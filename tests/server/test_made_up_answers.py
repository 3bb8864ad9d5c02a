"""Records made up at random, as answers to every message: nothing comes of them but exclusions."""

from dataclasses import replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import draw
from server.admission import Rejection, admit_replies
from server.attendance import ask_principal
from server.broadcast import Asked
from server.evaluation import evaluate_on_clients
from server.mailbox import Mailbox
from server.roster import Roster, Told, roster_after
from settings.keys import flatten
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.fake_clients import (
    BASE,
    SHAPES,
    counted,
    data_of,
    fake_app,
    member_named,
    settings_of,
    trained,
)
from wire.codec import pack
from wire.messages import EvaluateReply, Stamp, TrainReply
from wire.records import STYPE, to_record
from wire.rules import LocalRule

SETTINGS = settings_of("unused", lora__rank="2")
HONEST, RANK, ROUND = 3, 2, 1
STRANGER = FIRST_CLIENT_NODE + HONEST
FACTORS = trained(draw(SHAPES, RANK, 5, 2.0), 5)
ANSWERS = settings(max_examples=200, deadline=None, derandomize=True)

KEYS = st.sampled_from(
    [
        "client",
        "number",
        "rank",
        "num-examples",
        "base",
        "modules",
        "rows",
        "columns",
        "head",
        "head-shapes",
        "labels",
        "data",
        "holds",
        "chat-template",
        "reason",
        "round",
        "loss",
        "tokens",
        "steps",
        "seconds",
        "accuracy",
        "macro-f1",
        "wire-error",
    ]
)
NAMES = st.sampled_from(["site", "reply", "metrics", "adapter", "head", "principal", "failure"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**5000, 1e308])
TEXTS = st.text(max_size=20) | st.sampled_from(["client-00", "../x", "\x1b[2J", "3x5", "aa", BASE])
SCALARS = NUMBERS | TEXTS | st.binary(max_size=20) | st.booleans()
VALUES = (
    SCALARS
    | st.lists(st.integers(), max_size=4)
    | st.lists(st.floats(), max_size=4)
    | st.lists(TEXTS, max_size=4)
    | st.lists(st.binary(max_size=4), max_size=4)
    | st.lists(st.booleans(), max_size=4)
    | TEXTS.map(lambda text: [text] * 100_001)
)
FIELDS = st.dictionaries(KEYS | TEXTS, VALUES, max_size=5)
METRICS = st.dictionaries(
    KEYS | TEXTS, NUMBERS | st.lists(st.floats(), max_size=4) | st.lists(st.integers(), max_size=4)
)
ARRAYS = st.builds(
    Array,
    dtype=TEXTS | st.just("uint8"),
    shape=st.lists(st.integers(), max_size=3).map(tuple),
    stype=TEXTS | st.just(STYPE),
    data=st.binary(max_size=99),
)
RECORDS = (
    st.builds(ConfigRecord, FIELDS)
    | st.builds(MetricRecord, METRICS)
    | st.builds(ArrayRecord, st.dictionaries(TEXTS | st.just("packed"), ARRAYS, max_size=2))
    | st.binary(max_size=99).map(to_record)
)
MADE_UP = st.dictionaries(NAMES | TEXTS, RECORDS, max_size=3)
ERRORS = st.builds(Error, st.integers(), st.none() | st.text())


@st.composite
def answers(draw_one: st.DrawFn, honest: RecordDict) -> RecordDict | Error:
    """An error, records out of nothing, or an honest answer with some of it made up."""
    if draw_one(st.integers(0, 9)) == 0:
        return draw_one(ERRORS)
    made_up: dict[str, Any] = draw_one(MADE_UP)
    if draw_one(st.booleans()):
        return RecordDict(made_up)
    fields = {"site": FIELDS, "reply": FIELDS, "metrics": METRICS}
    content: dict[str, Any] = {**honest, **(made_up if draw_one(st.booleans()) else {})}
    for name in fields.keys() & honest.keys():
        kind: Any = type(honest[name])
        told: Any = {**honest[name], **draw_one(fields[name])}
        content.setdefault(name, honest[name])
        if draw_one(st.booleans()):
            content[name] = kind(told)
    return RecordDict(content)


def site(number: int) -> RecordDict:
    card = member_named(f"client-0{number}", rank=RANK, number=number, data=data_of(number)).card
    return replace(card, holds=frozenset()).to_records()


def reply(number: int) -> RecordDict:
    return EvaluateReply(Stamp(ROUND, BASE, data_of(number)), 10, 1.0, 50).to_records()


def trained_reply(number: int) -> RecordDict:
    return TrainReply(Stamp(ROUND, BASE, data_of(number)), pack(FACTORS), counted()).to_records()


def messages(kind: str, contents: list[RecordDict | Error]) -> list[Message]:
    """These answers, each from a node of its own."""
    InProcessGrid(fake_app(), 1, {})  # gives this process the identity that messages need
    found = []
    for number, content in enumerate(contents):
        ask = Message(RecordDict(), dst_node_id=FIRST_CLIENT_NODE + number, message_type=kind)
        answer: Any = content
        found.append(Message(answer, reply_to=ask))
    return found


ROSTER = Told(messages("query", [site(number) for number in range(HONEST + 1)])).roster()
ASKED = [Asked(member, LocalRule()) for member in ROSTER.members]


def honest_of(roster: Roster) -> list[int]:
    return [member.node_id for member in roster.members if member.node_id != STRANGER]


def assert_counted(counted: list[str], rejected: list[Rejection]) -> None:
    """The honest count; the stranger does, or it is excluded with a reason fit to be shown."""
    assert counted[:HONEST] == [f"client-0{number}" for number in range(HONEST)]
    assert [*counted[HONEST:], *(r.client for r in rejected)] == [f"client-0{HONEST}"]
    assert all(r.reason.isprintable() and len(r.reason) < 1000 for r in rejected)


@ANSWERS
@given(answers(site(HONEST)), st.booleans())
def test_no_answer_to_a_query_does_more_than_leave_its_site_out(
    made_up: RecordDict | Error, is_first: bool
) -> None:
    came = messages("query", [*map(site, range(HONEST)), made_up])
    roster = Told(reversed(came) if is_first else came).roster()
    later = roster_after(came[HONEST:], ROSTER)
    for found in (roster, later):
        assert len(honest_of(found)) == HONEST
        assert found.shapes == SHAPES
        assert len(found.members) == HONEST or not found.left_out or found is later
        for said in (*found.ranks, *found.left_out, *found.left_out.values()):
            assert said.isprintable()
            assert len(said) < 1000


@ANSWERS
@given(answers(trained_reply(HONEST)))
def test_no_answer_to_training_does_more_than_exclude_its_client(
    made_up: RecordDict | Error,
) -> None:
    came = messages("train", [*map(trained_reply, range(HONEST)), made_up])
    found = admit_replies(came, ASKED, None, ROSTER, SETTINGS, ROUND)
    assert_counted([reply.client for reply in found.replies], found.rejected)


@ANSWERS
@given(answers(reply(HONEST)))
def test_no_answer_to_an_evaluation_does_more_than_exclude_its_client(
    made_up: RecordDict | Error,
) -> None:
    came = messages("evaluate", [*map(reply, range(HONEST)), made_up])
    found, rejected = evaluate_on_clients(came, ASKED, ROUND, BASE)
    assert_counted([entry["client"] for entry in found["client_held_out"]], rejected)
    assert 0.0 <= found["client_held_out_loss"] <= 1e4


@ANSWERS
@given(answers(RecordDict({**site(0), "principal": to_record(pack(FACTORS))})))
def test_no_answer_hides_that_of_the_next_who_can_decompose_the_base(
    made_up: RecordDict | Error,
) -> None:
    def tamper(client: int, message: Message, honest: Message) -> Message:
        answer: Any = made_up
        return Message(answer, reply_to=message) if client == 0 else honest

    grid = InProcessGrid(fake_app(tamper=tamper), 2, flatten(SETTINGS))
    assert ask_principal(Mailbox(grid), ROSTER, RANK, 1.0).shapes == SHAPES
