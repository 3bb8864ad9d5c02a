"""Whatever bytes a stranger sends, `unpack` gives an Adapter or an AdapterError, nothing else."""

import json
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from adapters.adapter import Adapter
from core.errors import AdapterError
from tests.adapter_generators import QUICK
from tests.forged_payloads import DATA, VALID, Json, forged, framed
from wire.codec import unpack


def adapter_or_refusal(payload: bytes) -> Adapter | None:
    """Anything but an Adapter or an AdapterError fails the test that calls this."""
    try:
        adapter = unpack(payload)
    except AdapterError:
        return None
    for factors in adapter.values():
        assert np.isfinite(factors.a).all()
        assert np.isfinite(factors.b).all()
    assert len(adapter) > 0
    return adapter


@QUICK
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6))
def test_flipped_bytes_give_an_adapter_or_a_refusal(flips: list[tuple[int, int]]) -> None:
    payload = bytearray(VALID)
    for position, value in flips:
        payload[position] = value
    adapter_or_refusal(bytes(payload))


def test_any_one_flipped_bit_gives_an_adapter_or_a_refusal() -> None:
    data_begins = 8 + int.from_bytes(VALID[:8], "little")
    admitted = 0
    for position in range(len(VALID)):
        for bit in range(8):
            payload = bytearray(VALID)
            payload[position] ^= 1 << bit
            adapter = adapter_or_refusal(bytes(payload))
            admitted += adapter is not None
            assert adapter is None or position < data_begins  # the data are under the hash
    assert admitted > 0  # a digit of a scale, say


@QUICK
@given(st.binary(max_size=200))
@example(b"\0" * 8 + b"{}")
def test_random_bytes_are_refused(payload: bytes) -> None:
    assert adapter_or_refusal(payload) is None
    assert adapter_or_refusal(framed(payload)) is None


@QUICK
@given(st.binary(min_size=24, max_size=24))
def test_random_data_under_a_true_hash_comes_through_only_where_finite(data: bytes) -> None:
    adapter = adapter_or_refusal(forged(data=data))
    assert (adapter is not None) == bool(np.isfinite(np.frombuffer(data, "<f4")).all())


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-4, 40)
    | st.sampled_from([2**31, 2**63, -(2**70), 10**400])
    | st.floats()
    | st.sampled_from(["F32", "BF16", "F16", "bouquet-adapter-1", '{"q": 1}', "q.lora_A", ""])
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
PATHS = [
    ("q.lora_A",),
    ("extra.lora_A",),
    ("__metadata__",),
    *(("__metadata__", key) for key in ("format", "scales", "sha256")),
    *((f"q.lora_{half}", key) for half in "AB" for key in ("dtype", "shape", "data_offsets")),
    *((f"q.lora_{half}", "shape", i) for half in "AB" for i in (0, 1)),
    *((f"q.lora_{half}", "data_offsets", i) for half in "AB" for i in (0, 1)),
]


@QUICK
@given(st.lists(st.tuples(st.sampled_from(PATHS), TREES), min_size=1, max_size=3))
def test_a_header_with_other_values_gives_an_adapter_or_a_refusal(
    changes: list[tuple[tuple[Any, ...], Json]],
) -> None:
    header = json.loads(forged()[8 : -len(DATA)])
    for path, value in changes:
        place = header
        for key in path[:-1]:
            place = place[key] if isinstance(place, dict) and key in place else {}
        if isinstance(place, dict) or (isinstance(place, list) and path[-1] in range(len(place))):
            place[path[-1]] = value
    adapter_or_refusal(framed(json.dumps(header).encode()))
