"""What a reply can make the server allocate: its own adapter once, whatever it claims.

Measured by tracemalloc, to which numpy reports its arrays, while a reply is admitted or refused; an
adapter of some MB, so that the interpreter's own small objects do not count.
"""

import tracemalloc
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from adapters.adapter import Adapter
from server.admission import admit_replies
from server.broadcast import Asked, broadcast, round_messages
from server.roster import Roster
from settings.run import RunSettings
from simulations.grid import InProcessGrid
from strategies.strategy import GlobalModel
from tests.adapter_generators import make_adapter
from tests.fake_clients import BASE, counted, data_of, fake_app, member_named, settings_of
from tests.server.malformed_replies import MALFORMED_REPLIES
from wire.codec import budget_bytes, pack
from wire.messages import Stamp, TrainReply
from wire.rules import LocalRule

RANK, ROUND = 8, 3
SHAPES = {f"layers.{i}.{n}_proj": (1000, 1500) for i in range(12) for n in ("q", "v")}
TRIPLES = tuple((name, m, n) for name, (m, n) in sorted(SHAPES.items()))
MEMBER = member_named("client-00", 2, RANK, shapes=TRIPLES, data=data_of(0))
ROSTER = Roster([MEMBER], BASE, SHAPES, {})
ADAPTER = make_adapter(1, SHAPES, RANK, 2.0)
ALLOWED = 1.2


def honest(dtype: str = "float32", factors: str = "both") -> RecordDict:
    stamp = Stamp(ROUND, BASE, data_of(0))
    return TrainReply(stamp, pack(ADAPTER, dtype, factors), counted()).to_records()


def question(settings: RunSettings, rule: LocalRule) -> Message:
    InProcessGrid(fake_app(), 1, {})  # gives this process the identity that messages need
    sent = broadcast(GlobalModel(), "float32")
    (message,) = round_messages("train", [Asked(MEMBER, rule)], sent, settings, ROUND, BASE)
    return message


def allocated(
    reply: Message, settings: RunSettings, rule: LocalRule, start: Adapter | None
) -> tuple[int, int]:
    """The most bytes that admission held at once, and how many replies it let in."""
    tracemalloc.start()
    try:
        found: Any = admit_replies([reply], [Asked(MEMBER, rule)], start, ROSTER, settings, ROUND)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    replies = found[0] if isinstance(found, tuple) else found.replies
    return peak, len(replies)


@pytest.mark.parametrize("sends", ["both", "A", "B"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_admitting_takes_the_adapter_once(dtype: str, sends: str) -> None:
    settings, rule = settings_of("unused", wire__dtype=dtype), LocalRule(sends=sends)
    reply = Message(honest(dtype, sends), reply_to=question(settings, rule))
    peak, admitted = allocated(reply, settings, rule, ADAPTER)
    assert admitted == 1
    assert peak <= ALLOWED * budget_bytes(SHAPES, RANK)
    if sends == "both":
        assert peak > 4 * ADAPTER.num_parameters  # it was measured


@pytest.mark.parametrize("name", MALFORMED_REPLIES)
def test_refusing_takes_no_more_than_admitting(name: str) -> None:
    settings, rule = settings_of("unused"), LocalRule()
    message = question(settings, rule)
    bad: Any = MALFORMED_REPLIES[name][0](honest(), message)
    peak, admitted = allocated(Message(bad, reply_to=message), settings, rule, None)
    assert admitted == 0
    assert peak <= ALLOWED * budget_bytes(SHAPES, RANK)
