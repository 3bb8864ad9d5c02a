"""What is let in: an honest reply, and none of the malformed ones, each refused with its reason."""

import re
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from adapters.adapter import Adapter, Factors, draw
from server.admission import Rejection, admit_replies
from server.broadcast import Asked, broadcast, round_messages
from server.roster import Roster
from simulations.grid import InProcessGrid
from strategies.strategy import GlobalModel
from tests.adapter_generators import make_adapter
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
from tests.server.malformed_replies import MALFORMED_REPLIES
from wire.codec import pack
from wire.messages import Stamp, TrainReply
from wire.records import to_record
from wire.rules import LocalRule

SETTINGS = settings_of("unused")
RANK, ROUND = 2, 3
TRIPLES = tuple(sorted((name, m, n) for name, (m, n) in SHAPES.items()))
MEMBERS = [
    member_named(f"client-0{k}", 2 + k, RANK, number=k, shapes=TRIPLES, data=data_of(0))
    for k in range(2)
]
ASKED = [Asked(member, LocalRule()) for member in MEMBERS]
ROSTER = Roster(MEMBERS, BASE, SHAPES, {})
HONEST = trained(draw(SHAPES, RANK, 5, 2.0), 5)


def content(adapter: Adapter = HONEST, **metrics: Any) -> RecordDict:
    stamp = Stamp(ROUND, BASE, data_of(0))
    return TrainReply(stamp, pack(adapter), counted(**metrics)).to_records()


def messages() -> list[Message]:
    InProcessGrid(fake_app(), 2, {})  # gives this process the identity that messages need
    sent = broadcast(GlobalModel(), "float32")
    return round_messages("train", ASKED, sent, SETTINGS, ROUND, BASE)


def admit(
    replies: list[Message], asked: list[Asked] = ASKED, start: Adapter | None = None
) -> tuple[list[Any], list[Rejection]]:
    found = admit_replies(replies, asked, start, ROSTER, SETTINGS, ROUND)
    return found.replies, found.rejected


def test_an_honest_reply_is_admitted_as_it_is() -> None:
    first, second = messages()
    replies, rejected = admit(
        [Message(content(), reply_to=second), Message(content(num_examples=30), reply_to=first)]
    )
    assert rejected == []
    assert [(r.client, r.metrics.num_examples) for r in replies] == [
        ("client-00", 30),
        ("client-01", 10),
    ]
    assert pack(replies[0].adapter) == pack(HONEST)
    assert replies[0].bytes_up == len(pack(HONEST))


@pytest.mark.parametrize("first", [True, False], ids=["arrives first", "arrives last"])
@pytest.mark.parametrize("name", MALFORMED_REPLIES)
def test_a_malformed_reply_is_refused_by_name_and_reason(name: str, first: bool) -> None:
    make, reason = MALFORMED_REPLIES[name]
    one, other = messages()
    bad: Any = make(content(), one)
    answers = [Message(bad, reply_to=one), Message(content(), reply_to=other)]
    replies, rejected = admit(answers if first else answers[::-1])
    assert [reply.client for reply in replies] == ["client-01"]
    assert [rejection.client for rejection in rejected] == ["client-00"]
    assert re.search(reason, rejected[0].reason), rejected[0].reason
    assert len(rejected[0].reason) < 700
    assert rejected[0].reason.isprintable()


@pytest.mark.parametrize("sends", ["A", "B"])
@pytest.mark.parametrize("sent", ["A", "B", "both"])
def test_a_factor_that_was_not_asked_for_is_refused(sends: str, sent: str) -> None:
    asked = [Asked(MEMBERS[0], LocalRule(sends=sends))]
    reply = Message(
        RecordDict({**content(), "adapter": to_record(pack(HONEST, factors=sent))}),
        reply_to=messages()[0],
    )
    start = draw(SHAPES, RANK + 1, 7, 1.0)
    replies, rejected = admit([reply], asked, start)
    if sent == sends:
        assert [reply.client for reply in replies] == ["client-00"]
        return
    assert replies == []
    other = "B" if sends == "A" else "A"
    expected = rf"tensor 'layers.*lora_{other}' came where lora_{sends} alone was asked for|beyond"
    assert re.search(expected, rejected[0].reason), rejected[0].reason


@pytest.mark.parametrize("scale", [1e-300, 1e-44])
@pytest.mark.parametrize("kind", ["B zero", "normal"])
def test_a_scale_so_small_that_the_known_factor_overflows_is_refused(
    kind: str, scale: float
) -> None:
    tiny = Adapter({name: Factors(f.a, f.b, scale) for name, f in HONEST.items()})
    reply = Message(
        RecordDict({**content(), "adapter": to_record(pack(tiny, factors="A"))}),
        reply_to=messages()[0],
    )
    start = make_adapter(1, SHAPES, RANK, 1.0, kind)
    asked = [Asked(MEMBERS[0], LocalRule(sends="A"))]
    replies, rejected = admit([reply], asked, start)
    assert replies == []
    assert "its scale is too small for the lora_B that is here" in rejected[0].reason


def test_a_crashed_and_a_silent_client_are_named() -> None:
    first, _ = messages()
    replies, rejected = admit([Message(Error(2, "out of memory"), reply_to=first)])
    assert replies == []
    assert rejected[0] == Rejection("client-00", "the client failed: out of memory")
    assert rejected[1].client == "client-01"
    assert rejected[1].reason.startswith("no reply within")


def test_of_two_replies_the_first_counts_and_strangers_are_not_heard() -> None:
    first, second = messages()
    stranger = round_messages(
        "train",
        [Asked(member_named("x", 99, RANK, number=9, shapes=TRIPLES), LocalRule())],
        broadcast(GlobalModel(), "float32"),
        SETTINGS,
        ROUND,
        BASE,
    )[0]
    replies, rejected = admit(
        [
            Message(content(num_examples=11), reply_to=first),
            Message(content(num_examples=12), reply_to=first),
            Message(content(), reply_to=stranger),
            Message(content(), reply_to=second),
        ]
    )
    assert [reply.metrics.num_examples for reply in replies] == [11, 10]
    assert rejected == []


def test_each_client_gets_its_own_seed_and_the_same_model() -> None:
    model = GlobalModel(merged=HONEST)
    sent = broadcast(model, "float32")
    one, other = round_messages("train", ASKED, sent, SETTINGS, ROUND, BASE)
    seeds = {message.content["instruction"]["seed"] for message in (one, other)}
    assert len(seeds) == 2
    assert one.metadata.ttl == 1.5 * SETTINGS.clients.timeout_seconds
    assert one.content["merged"] is other.content["merged"]
    assert "start" not in one.content
    assert sent.version != broadcast(GlobalModel(start=HONEST), "float32").version


def test_half_precision_halves_the_bytes() -> None:
    large = draw({"q": (512, 512)}, 32, 0, 1.0)
    exact = broadcast(GlobalModel(merged=large), "float32").num_bytes
    assert broadcast(GlobalModel(merged=large), "bfloat16").num_bytes < 0.51 * exact


CORRECTED = [Asked(member, LocalRule(control=True)) for member in MEMBERS]
GRADIENTS = make_adapter(3, SHAPES, RANK, 1.0)
TOO_MUCH = Adapter({n: Factors(1e6 * f.a, f.b, 1.0) for n, f in GRADIENTS.items()})
NOT_FINITE = Adapter({n: Factors(np.float32(np.nan) * f.a, f.b, 1.0) for n, f in GRADIENTS.items()})


def corrected(control: bytes | None) -> RecordDict:
    stamp = Stamp(ROUND, BASE, data_of(0))
    return TrainReply(stamp, pack(HONEST), counted(), control=control).to_records()


def test_a_control_variate_comes_with_a_reply_where_it_is_asked_for() -> None:
    first, second = messages()
    answers = [Message(corrected(pack(GRADIENTS)), reply_to=one) for one in (first, second)]
    replies, rejected = admit(answers, CORRECTED)
    assert rejected == []
    assert [pack(reply.control) for reply in replies] == [pack(GRADIENTS)] * 2
    assert replies[0].bytes_up == len(pack(HONEST)) + len(pack(GRADIENTS))
    replies, rejected = admit([Message(corrected(pack(GRADIENTS)), reply_to=first)])
    assert replies == []
    assert "the record 'control' was not asked for" in rejected[0].reason


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        (None, "expected an ArrayRecord with the one array 'packed'; got none"),
        (b"nothing", "at least 8 bytes|truncated|header"),
        (pack(make_adapter(3, SHAPES, RANK + 1, 1.0)), "bytes came where at most|goes beyond the"),
        (pack(make_adapter(3, SHAPES, RANK - 1, 1.0)), f"rank {RANK - 1} .*expected {RANK} and 1"),
        (pack(make_adapter(3, SHAPES, RANK, 2.0)), "scale 2 .*expected 2 and 1"),
        (pack(Adapter({"k": make_adapter(3, {"k": (6, 8)}, RANK, 1.0)["k"]})), "modules or shapes"),
        (pack(TOO_MUCH), "control variate of .* holds .*; trained factors stay below"),
        (pack(NOT_FINITE), "not finite"),
        (b"x" * 10**6, "1,000,000 bytes came where at most"),
    ],
)
def test_a_bad_control_variate_is_a_bad_reply(control: bytes | None, reason: str) -> None:
    first, second = messages()
    answers = [
        Message(corrected(control), reply_to=first),
        Message(corrected(pack(GRADIENTS)), reply_to=second),
    ]
    replies, rejected = admit(answers, CORRECTED)
    assert [reply.client for reply in replies] == ["client-01"]
    assert rejected[0].client == "client-00"
    assert re.search(reason, rejected[0].reason), rejected[0].reason
