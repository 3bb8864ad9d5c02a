"""Each message is written and read in one place: what is read is what was written, or refused."""

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from core.errors import AdapterError, BouquetError, ReplyError
from settings.run import run_settings
from wire.messages import (
    EvaluateReply,
    Failure,
    Instruction,
    Parts,
    Query,
    Stamp,
    TrainMetrics,
    TrainReply,
    holdings_in,
)
from wire.rules import FACTORS, LocalRule
from wire.site_card import SiteCard

SETTINGS = run_settings({})
VERSIONS = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), max_size=3).map(tuple)
HOLDINGS = st.none() | VERSIONS.map(frozenset)
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,9}", fullmatch=True)
COUNTS = st.integers(0, 10**9)
STAMPS = st.builds(
    Stamp, round=st.integers(1, 99), base=NAMES, data=st.sampled_from(["", "0a"]), holds=HOLDINGS
)
METRICS = st.builds(
    TrainMetrics,
    num_examples=COUNTS,
    loss=st.floats(0, 1e4),
    tokens=COUNTS,
    steps=COUNTS,
    seconds=st.floats(0, 1e9),
    peak_bytes=COUNTS,
    examples_seen=st.none() | COUNTS,
    wire_error=st.floats(0, 1e4),
)
RULES = st.builds(
    LocalRule,
    trains=st.sampled_from(FACTORS),
    sends=st.sampled_from(FACTORS),
    receives=st.sampled_from(FACTORS),
    keeps_b=st.booleans(),
    keeps_head=st.booleans(),
    freezes_tail=st.booleans(),
    rank=st.integers(0, 64),
    prune=st.floats(0.1, 1.0),
    min_rank=st.integers(1, 9),
    penalty=st.floats(0, 1e3),
)


@given(
    st.builds(
        Instruction,
        run=NAMES,
        round=st.integers(1, 99),
        base=NAMES,
        version=NAMES,
        seed=st.integers(0, 2**62),
        start_seed=st.integers(0, 2**62),
        wire_dtype=st.sampled_from(["float32", "int8"]),
        optimizer=st.sampled_from(["fresh", "kept"]),
        rule=RULES,
        lora=st.just(SETTINGS.lora),
        local=st.just(SETTINGS.local),
        parts=st.none() | VERSIONS.map(lambda v: Parts(v, ("plus",) * len(v), v[0] if v else "")),
    )
)
def test_an_instruction_arrives_as_it_was_given(instruction: Instruction) -> None:
    assert Instruction.from_records(instruction.to_records()) == instruction


@given(STAMPS, METRICS, st.binary(max_size=9), st.none() | st.binary(max_size=9))
def test_a_reply_arrives_as_it_was_given(
    stamp: Stamp, metrics: TrainMetrics, adapter: bytes, head: bytes | None
) -> None:
    content = TrainReply(stamp, adapter, metrics, head).to_records()
    came = Stamp.from_records(content, stamp.round, stamp.base, stamp.data)
    found = TrainReply.from_records(content, came, 9, None if head is None else 9)
    assert (found.stamp, found.adapter, found.head) == (stamp, adapter, head)
    assert found.metrics == metrics
    assert holdings_in(content) == stamp.holds


@given(STAMPS, COUNTS, st.floats(0, 1e4), st.integers(1, 10**9), st.floats(0, 1))
def test_an_evaluation_arrives_as_it_was_given(
    stamp: Stamp, examples: int, loss: float, tokens: int, accuracy: float
) -> None:
    reply = EvaluateReply(stamp, examples, loss, tokens, {"accuracy": accuracy})
    content = reply.to_records()
    came = Stamp.from_records(content, stamp.round, stamp.base, stamp.data)
    assert EvaluateReply.from_records(content, came) == reply


@given(HOLDINGS, st.none() | st.binary(max_size=9))
def test_a_card_arrives_as_it_was_given(
    holds: frozenset[str] | None, principal: bytes | None
) -> None:
    card = SiteCard(
        "oslo",
        3,
        2,
        10,
        "tiny",
        (("k", 4, 8), ("q", 6, 8)),
        (("score.weight", (2, 8)),),
        ("no", "yes"),
        "0a",
        "0b",
        holds,
        principal,
    )
    assert SiteCard.from_records(card.to_records()) == replace(card, principal=None)


@given(st.integers(0, 10**6))
def test_a_query_arrives_as_it_was_asked(rank: int) -> None:
    assert Query.from_records(Query(rank).to_records()) == Query(rank)


def test_a_query_of_an_older_server_asks_for_nothing_more() -> None:
    assert Query.from_records(RecordDict()) == Query()


def test_the_words_of_a_failure_are_cut_and_escaped() -> None:
    found = Failure.from_records(Failure("\x1b[2J" + "no " * 10_000, "os\nlo").to_records())
    assert found is not None
    assert found.reason.startswith("\\x1b[2Jno no")
    assert len(found.reason) < 600
    assert found.client == "os\\nlo"


METRIC_NAMES = ["num-examples", "loss", "tokens", "steps", "seconds", "peak-bytes"]


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_a_reply_that_leaves_out_what_it_must_say_is_refused(name: str) -> None:
    content = TrainReply(Stamp(1, "b"), b"x", TrainMetrics(1, 1.0, 1, 1, 1.0, 0)).to_records()
    del content.metric_records["metrics"][name]
    with pytest.raises(ReplyError, match=f"{name} is missing"):
        TrainReply.from_records(content, Stamp(1, "b"), 9)


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    content = TrainReply(Stamp(1, "b"), b"x" * 10, TrainMetrics(1, 1.0, 1, 1, 1.0, 0)).to_records()
    with pytest.raises(AdapterError, match="10 bytes came where at most 9"):
        TrainReply.from_records(content, Stamp(1, "b"), 9)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"rule.trains": "C"}, "rule.trains must be text, one of A, B, both; got 'C'"),
        ({"rule.dances": True}, "unknown configuration key 'rule.dances'"),
        ({"rule.prune": 0.0}, "rule.prune must be a number, above 0, at most 1; got 0.0"),
    ],
)
def test_a_rule_of_another_version_is_told_as_such(told: dict[str, Any], words: str) -> None:
    instruction = Instruction(
        "run", 1, "b", "v", 1, 1, "float32", "fresh", LocalRule(), SETTINGS.lora, SETTINGS.local
    )
    record = instruction.to_records().config_records["instruction"]
    content = RecordDict({"instruction": ConfigRecord({**record, **told})})
    with pytest.raises(BouquetError, match="need the same version of bouquet: it asks what") as no:
        Instruction.from_records(content)
    assert words in str(no.value)
