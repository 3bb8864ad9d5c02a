"""What is let in: one honest reply, and a table of dishonest ones, each refused with its reason."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from adapters.adapter import Adapter, Factors, draw
from adapters.codec import pack
from adapters.records import STYPE, to_record
from server.broadcast import Asked, broadcast, round_messages
from server.exchange import Rejection, admit_replies
from server.roster import Member, Roster
from simulations.grid import InProcessGrid
from strategies.strategy import GlobalModel, LocalRule
from tests.fake_clients import BASE, SHAPES, fake_app, settings_of, trained

SETTINGS = settings_of("unused")
RANK, ROUND = 2, 3
TRIPLES = tuple(sorted((name, m, n) for name, (m, n) in SHAPES.items()))
MEMBERS = [Member(f"client-0{k}", k, 2 + k, RANK, 10, BASE, TRIPLES) for k in range(2)]
ASKED = [Asked(member, LocalRule()) for member in MEMBERS]
ROSTER = Roster(MEMBERS, BASE, SHAPES, {})
HONEST = trained(draw(SHAPES, RANK, 5, 2.0), 5)


def content(adapter: Adapter = HONEST, **metrics: Any) -> RecordDict:
    numbers = {"num-examples": 10, "loss": 1.0, "tokens": 50, "steps": 2, "seconds": 0.1}
    numbers |= {name.replace("_", "-"): value for name, value in metrics.items()}
    return RecordDict(
        {
            "adapter": to_record(pack(adapter)),
            "reply": ConfigRecord({"round": ROUND, "base": BASE}),
            "metrics": MetricRecord(numbers),
        }
    )


def changed(change: Callable[[Factors], Factors], only: str | None = None) -> RecordDict:
    modules = {n: change(f) if only in (None, n) else f for n, f in HONEST.items()}
    return content(Adapter(modules))


def without(name: str) -> RecordDict:
    record = content()
    del record[name]
    return record


def raw(data: bytes, **over: Any) -> RecordDict:
    fields: dict[str, Any] = {"dtype": "uint8", "shape": (len(data),), "stype": STYPE} | over
    record = content()
    record["adapter"] = ArrayRecord({"packed": Array(data=data, **fields)})
    return record


def stamped(**stamp: Any) -> RecordDict:
    record = content()
    record["reply"] = ConfigRecord({"round": ROUND, "base": BASE, **stamp})
    return record


def renamed() -> RecordDict:
    return content(Adapter({name + ".x": factors for name, factors in HONEST.items()}))


def of_rank(rank: int) -> RecordDict:
    return content(trained(draw(SHAPES, rank, 5, 2.0), 5))


FIRST = next(iter(SHAPES))
BAD: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "zero examples": (lambda: content(num_examples=0), "whole number from 1"),
    "negative examples": (lambda: content(num_examples=-3), "whole number from 1"),
    "half an example": (lambda: content(num_examples=0.5), "whole number from 1"),
    "too many examples": (lambda: content(num_examples=10**12), "whole number from 1"),
    "NaN examples": (lambda: content(num_examples=float("nan")), "finite number"),
    "infinite loss": (lambda: content(loss=float("inf")), "'loss' must be a finite number"),
    "list metric": (lambda: content(loss=[1.0, 2.0]), "finite number"),
    "no metrics": (lambda: without("metrics"), "no MetricRecord"),
    "no adapter": (lambda: without("adapter"), "expected an ArrayRecord"),
    "no stamp": (lambda: without("reply"), "expected a reply to round 3; got one to None"),
    "another round": (lambda: stamped(round=2), "expected a reply to round 3; got one to 2"),
    "another base": (lambda: stamped(base="other"), "trained on base 'other'"),
    "wrong names": (renamed, "modules or shapes differ"),
    "a missing module": (
        lambda: content(Adapter({n: f for n, f in HONEST.items() if n != FIRST})),
        "modules or shapes differ",
    ),
    "swapped factors": (
        lambda: changed(lambda f: Factors(f.b.T.copy(), f.a.T.copy(), f.scale)),
        "modules or shapes differ",
    ),
    "rank too low": (lambda: of_rank(1), "has rank 1; this client's is 2"),
    "rank too high": (lambda: of_rank(4), r"bytes came where at most|has rank 4"),
    "zero scale": (lambda: changed(lambda f: Factors(f.a, f.b, 0.0)), "has scale 0"),
    "negative scale": (lambda: changed(lambda f: Factors(f.a, f.b, -1.0)), "has scale -1"),
    "huge scale": (lambda: changed(lambda f: Factors(f.a, f.b, 1e9)), "has scale 1e"),
    "huge factors": (
        lambda: changed(lambda f: Factors(f.a * np.float32(1e30), f.b, f.scale), only=FIRST),
        "trained factors stay below",
    ),
    "not an adapter": (lambda: raw(b"\x80\x04not an adapter at all"), "truncated or not an"),
    "cut bytes": (lambda: raw(pack(HONEST)[:-7]), "SHA-256"),
    "too many bytes": (lambda: raw(pack(HONEST) + b"0" * 10**5), "bytes came where at most"),
    "floats for bytes": (lambda: raw(pack(HONEST), dtype="float32"), "expected uint8 bytes"),
    "a foreign array type": (lambda: raw(pack(HONEST), stype="numpy.ndarray"), "expected uint8"),
    "an array per tensor": (
        lambda: RecordDict(
            {**content(), "adapter": ArrayRecord([np.ones(3, np.float32), np.ones(3, np.float32)])}
        ),
        "expected an ArrayRecord with the one array 'packed'",
    ),
    "its own failure": (
        lambda: RecordDict({"failure": ConfigRecord({"reason": "no data here"})}),
        "the client reports: no data here",
    ),
}


def messages() -> list[Message]:
    InProcessGrid(fake_app(), 2, {})  # gives this process the identity that messages need
    sent = broadcast(GlobalModel(), "float32")
    return round_messages("train", ASKED, sent, SETTINGS, ROUND, BASE)


def admit(replies: list[Message]) -> tuple[list[Any], list[Rejection]]:
    found = admit_replies(replies, ASKED, None, ROSTER, SETTINGS, ROUND)
    return found.replies, found.rejected


def test_an_honest_reply_is_admitted_as_it_is() -> None:
    first, second = messages()
    replies, rejected = admit(
        [Message(content(), reply_to=second), Message(content(num_examples=30), reply_to=first)]
    )
    assert rejected == []
    assert [(r.member.name, r.num_examples) for r in replies] == [
        ("client-00", 30),
        ("client-01", 10),
    ]
    assert pack(replies[0].adapter) == pack(HONEST)
    assert replies[0].bytes_up == len(pack(HONEST))


@pytest.mark.parametrize("first", [True, False], ids=["arrives first", "arrives last"])
@pytest.mark.parametrize("name", BAD)
def test_a_dishonest_reply_is_refused_by_name_and_reason(name: str, first: bool) -> None:
    make, reason = BAD[name]
    one, other = messages()
    answers = [Message(make(), reply_to=one), Message(content(), reply_to=other)]
    replies, rejected = admit(answers if first else answers[::-1])
    assert [reply.member.name for reply in replies] == ["client-01"]
    assert [rejection.client for rejection in rejected] == ["client-00"]
    assert re.search(reason, rejected[0].reason), rejected[0].reason
    assert len(rejected[0].reason) < 700


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
        [Asked(Member("x", 9, 99, RANK, 10, BASE, TRIPLES), LocalRule())],
        broadcast(GlobalModel(), "float32"),
        SETTINGS,
        ROUND,
        BASE,
    )[0]
    replies, rejected = admit(
        [
            Message(content(num_examples=1), reply_to=first),
            Message(content(num_examples=2), reply_to=first),
            Message(content(), reply_to=stranger),
            Message(content(), reply_to=second),
        ]
    )
    assert [reply.num_examples for reply in replies] == [1, 10]
    assert rejected == []


def test_each_client_gets_its_own_seed_and_the_same_model() -> None:
    model = GlobalModel(merged=HONEST)
    sent = broadcast(model, "float32")
    one, other = round_messages("train", ASKED, sent, SETTINGS, ROUND, BASE)
    seeds = {message.content["instruction"]["seed"] for message in (one, other)}
    assert len(seeds) == 2
    assert one.content["merged"] is other.content["merged"]
    assert "start" not in one.content
    assert sent.version != broadcast(GlobalModel(start=HONEST), "float32").version


def test_half_precision_halves_the_bytes() -> None:
    large = draw({"q": (512, 512)}, 32, 0, 1.0)
    exact = broadcast(GlobalModel(merged=large), "float32").num_bytes
    assert broadcast(GlobalModel(merged=large), "bfloat16").num_bytes < 0.51 * exact
