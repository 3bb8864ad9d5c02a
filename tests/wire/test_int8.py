"""int8 in blocks: how far a value may move, what stays, and what a stranger may not claim.

The oracle reads the bytes with the safetensors library and multiplies q by s in float64, value by
value, from the description of the format alone.
"""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors
from adapters.algebra import relative_error
from core.errors import AdapterError
from tests.adapter_generators import AWKWARD, QUICK, adapters, make_adapter
from tests.dense_oracle import Dense, add, dense_deltas, distance, double, frobenius
from tests.forged_payloads import entry, forged
from wire.codec import as_sent, budget_bytes, pack, unpack

BLOCK = 256
BFLOAT16_ROUNDING = 2.0**-8
SMALLEST_SCALE = 2.0**-126


def in_memory_order(factors: Factors) -> dict[str, Dense]:
    """The values as the blocks take them: A row by row, B column by column."""
    return {"A": double(factors.a).ravel(), "B": double(factors.b).T.ravel()}


def blocks(values: Dense) -> list[Dense]:
    return [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]


@QUICK
@given(adapters(kinds=AWKWARD))
def test_a_value_moves_by_at_most_a_254th_of_the_largest_of_its_block(adapter: Adapter) -> None:
    received = unpack(pack(adapter, "int8"))
    for name, factors in adapter.items():
        assert received[name].scale == factors.scale
        came = in_memory_order(received[name])
        for half, values in in_memory_order(factors).items():
            for before, after in zip(blocks(values), blocks(came[half]), strict=True):
                step = np.abs(before).max() / 127 * (1 + BFLOAT16_ROUNDING)
                assert np.abs(after - before).max() <= 0.5001 * max(step, SMALLEST_SCALE)
                assert np.all(after[before == 0.0] == 0.0)
                assert np.all(before * after >= 0.0)


@QUICK
@given(adapters(kinds=AWKWARD))
def test_packing_what_was_unpacked_changes_no_value(adapter: Adapter) -> None:
    once = unpack(pack(adapter, "int8"))
    twice = unpack(pack(once, "int8"))
    for name in once:
        assert np.array_equal(once[name].a, twice[name].a)
        assert np.array_equal(once[name].b, twice[name].b)


def read_by_hand(packed: bytes, tensor: str) -> Dense:
    """q s in float64, in memory order."""
    tensors = safetensors.torch.load(packed)
    q, scales = tensors[tensor], tensors[tensor + ".scales"]
    assert (q.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    flat = (q if tensor.endswith("A") else q.T).flatten().double().numpy()
    return double(flat * np.repeat(scales.double().numpy(), BLOCK)[: len(flat)])


def test_the_bytes_mean_q_times_the_scale_of_its_block() -> None:
    adapter = make_adapter(1, {"q": (50, 70), "v": (3, 5)}, 7, 0.5)
    packed = pack(adapter, "int8")
    for name, factors in unpack(packed).items():
        for half, values in in_memory_order(factors).items():
            assert np.array_equal(values, read_by_hand(packed, f"{name}.lora_{half}"))


@pytest.mark.parametrize("exponent", [-45, -42, -38, -30, -8, 0, 8, 30, 36])
def test_blocks_of_any_size_keep_their_digits(exponent: int) -> None:
    values = (np.linspace(-1.0, 1.0, 600) * 10.0**exponent).astype(np.float32).reshape(1, 600)
    adapter = Adapter({"q": Factors(values, np.zeros((4, 1), np.float32), 1.0)})
    received = unpack(pack(adapter, "int8"))["q"]
    error = np.abs(double(received.a) - double(values)).max()
    assert error <= max(10.0**exponent / 254 * (1 + BFLOAT16_ROUNDING), SMALLEST_SCALE / 2) * 1.0001
    assert not received.b.any()


def test_a_small_direction_beside_a_large_one_keeps_its_digits() -> None:
    rng = np.random.default_rng(2)
    sizes = np.array([1.0, 1e-4], np.float32)
    b = rng.standard_normal((256, 2), dtype=np.float32) * sizes
    adapter = Adapter({"q": Factors(np.ones((2, 256), np.float32), b, 1.0)})
    received = unpack(pack(adapter, "int8"))["q"].b
    for column in (0, 1):
        error = np.linalg.norm(received[:, column] - b[:, column])
        assert error < 0.01 * np.linalg.norm(b[:, column])


def test_a_module_of_rank_0_crosses() -> None:
    empty = Factors(np.zeros((0, 6), np.float32), np.zeros((4, 0), np.float32), 2.0)
    received = unpack(pack(Adapter({"q": empty}), "int8"))["q"]
    assert (received.rank, received.shape, received.scale) == (0, (4, 6), 2.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_int8_cannot_hold_are_refused(value: float) -> None:
    a = np.array([[1.0, value]], np.float32)
    adapter = Adapter({"q": Factors(a, np.zeros((1, 1), np.float32), 1.0)})
    with pytest.raises(AdapterError, match=r"q\.lora_A holds values too large for int8 or not fin"):
        pack(adapter, "int8")


def test_the_largest_float_crosses() -> None:
    a = np.array([[np.finfo(np.float32).max, 1.0]], np.float32)
    adapter = Adapter({"q": Factors(a, np.zeros((1, 1), np.float32), 1.0)})
    assert unpack(pack(adapter, "int8"))["q"].a[0, 0] == pytest.approx(a[0, 0], rel=1e-3)


def test_int8_takes_a_quarter_of_the_bytes() -> None:
    shapes = {f"layers.{i}.q_proj": (1024, 1024) for i in range(4)}
    adapter = make_adapter(3, shapes, 64)
    assert len(pack(adapter, "int8")) <= 0.255 * 4 * adapter.num_parameters
    assert len(pack(adapter, "int8")) <= budget_bytes(shapes, 64, "int8")
    scales = 2 * 2 * 4 * 64 * 1024 // BLOCK
    assert budget_bytes(shapes, 64, "int8") - budget_bytes(shapes, 0, "int8") == (
        adapter.num_parameters + scales
    )


@QUICK
@given(adapters(ranks=(1, 2, 5)), st.sampled_from(["A", "B"]))
def test_one_factor_travels_and_the_other_is_known(adapter: Adapter, half: str) -> None:
    packed = pack(adapter, "int8", half)
    received, whole = unpack(packed, adapter), unpack(pack(adapter, "int8"))
    for name, factors in adapter.items():
        expected = {"A": factors.a, "B": factors.b} | {half: getattr(whole[name], half.lower())}
        assert np.array_equal(received[name].a, expected["A"])
        assert np.allclose(received[name].b, expected["B"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_the_rounding_error_is_that_of_dense_matrices(dtype: str) -> None:
    shapes = {"q": (30, 20), "v": (10, 40)}
    parts = [make_adapter(4, shapes, 6, 0.5), make_adapter(5, shapes, 3, 2.0)]
    received = [as_sent(part, dtype) for part in parts]
    whole = add(dense_deltas(parts[0]), dense_deltas(parts[1]))
    came = add(dense_deltas(received[0]), dense_deltas(received[1]))
    expected = distance(whole, came) / frobenius(whole)
    assert relative_error(parts, received) == pytest.approx(expected, rel=1e-3)
    assert 1e-5 < expected < 0.02


def test_there_is_no_rounding_error_where_there_is_nothing_to_round() -> None:
    fresh = make_adapter(6, {"q": (4, 4)}, 2, kind="B zero")
    assert relative_error([fresh], [as_sent(fresh, "int8")]) == 0.0
    assert relative_error([], []) == 0.0
    exact = make_adapter(7, {"q": (4, 4)}, 2)
    assert relative_error([exact], [as_sent(exact, "float32")]) < 1e-12


def bfloat16(*values: float) -> bytes:
    upper: npt.NDArray[np.uint32] = np.array(values, np.float32).view(np.uint32) >> 16
    return upper.astype("<u2").tobytes()


def in_int8(scales: bytes = bfloat16(1.0), q: bytes = b"\1\2", **claims: Any) -> bytes:
    """q.lora_A in int8, with these scales; q.lora_B in float32."""
    claim = {"shape": [len(scales) // 2], "dtype": "BF16", **claims}
    at = len(q) + len(scales)
    entries = {
        "q.lora_A": entry([1, len(q)], 0, len(q), "I8"),
        claim.pop("name", "q.lora_A.scales"): {**claim, "data_offsets": [len(q), at]},
        "q.lora_B": entry([2, 1], at, at + 8),
    }
    return forged(entries, q + scales + np.ones(2, "<f4").tobytes())


FOLLOWED = r"tensor 'q.lora_A' in I8 must be followed by its .scales, 1 of them in BF16; got"
POSITIVE = "tensor 'q.lora_A': the scale of every block must be finite and above zero; got"
MALFORMED: dict[str, tuple[bytes, str]] = {
    "scale NaN": (in_int8(bfloat16(np.nan)), f"{POSITIVE} nan for block 0 of 1"),
    "scale infinite": (in_int8(bfloat16(np.inf)), f"{POSITIVE} inf"),
    "scale negative": (in_int8(bfloat16(-1.0)), f"{POSITIVE} -1 "),
    "scale zero": (in_int8(bfloat16(0.0)), f"{POSITIVE} 0 "),
    "the second scale": (
        in_int8(bfloat16(1.0, -2.0), q=bytes(257)),
        f"{POSITIVE} -2 for block 1 of 2",
    ),
    "scale too large": (in_int8(bfloat16(3e38)), "'q.lora_A' holds values that are not finite"),
    "too many scales": (in_int8(bfloat16(1.0, 1.0)), FOLLOWED),
    "too few scales": (in_int8(b""), FOLLOWED),
    "scales in float16": (in_int8(dtype="F16"), FOLLOWED),
    "scales in a matrix": (in_int8(shape=[1, 1]), FOLLOWED),
    "a scale without dimension": (in_int8(shape=[]), FOLLOWED),
    "as many scales as true": (in_int8(shape=[True]), FOLLOWED),
    "scales of another tensor": (in_int8(name="q.lora_B.scales"), FOLLOWED),
    "scales that lie elsewhere": (
        in_int8().replace(b"[2, 4]", b"[0, 2]"),
        "tensor 'q.lora_A.scales' of shape .* should lie at bytes 2 to 4 of 12; .* says 0 to 2",
    ),
    "nothing follows": (
        forged({"q.lora_A": entry([1, 2], 0, 2, "I8")}, b"\1\2"),
        f"{FOLLOWED} 'nothing'",
    ),
    "-128": (in_int8(q=b"\1\x80"), "'q.lora_A': values in int8 go from -127 to 127; got -128"),
    "scales without a tensor": (
        forged({"q.lora_A.scales": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
        "tensor 'q.lora_A.scales' must have .* a shape of two sizes",
    ),
    "scales after float32": (
        forged(
            {
                "q.lora_A": entry([1, 1], 0, 4),
                "q.lora_A.scales": {"dtype": "BF16", "shape": [1], "data_offsets": [4, 6]},
            },
            bytes(6),
        ),
        "tensor 'q.lora_A.scales' must have .* a shape of two sizes",
    ),
}


@pytest.mark.parametrize(("payload", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_int8_is_refused_with_its_reason(payload: bytes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        unpack(payload)


def test_the_forged_int8_is_valid_until_something_in_it_is_changed() -> None:
    assert unpack(in_int8())["q"].a.tolist() == [[1.0, 2.0]]
    assert json.loads(in_int8()[8:].partition(b"}}")[0] + b"}}")["q.lora_A"]["dtype"] == "I8"


@pytest.mark.parametrize("scales", ["0.5", '{"q": 0.5, "v": 0.5}'])
def test_one_scale_for_all_modules_is_that_of_each(scales: str) -> None:
    entries = {
        f"{name}.lora_{half}": entry([1, 1], 4 * at, 4 * at + 4)
        for at, (name, half) in enumerate([("q", "A"), ("q", "B"), ("v", "A"), ("v", "B")])
    }
    received = unpack(forged(entries, np.ones(4, "<f4").tobytes(), scales))
    assert {name: factors.scale for name, factors in received.items()} == {"q": 0.5, "v": 0.5}
