"""A head's bytes are checked like an adapter's: what is not exactly a head is refused."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from adapters.head import Head, draw_head, head_shapes, mean_of_heads
from core.errors import AdapterError
from tests.adapter_generators import QUICK
from wire.head import head_budget_bytes, pack_head, unpack_head

SHAPES: dict[str, tuple[int, ...]] = {"classifier.bias": (3,), "classifier.weight": (3, 16)}


def random_head(seed: int = 0, size: float = 1.0) -> Head:
    rng = np.random.default_rng(seed)
    return {
        name: (size * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def header_of(packed: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    """The header of a safetensors file, and the data behind it."""
    (length,) = struct.unpack("<Q", packed[:8])
    return json.loads(packed[8 : 8 + length]), packed[8 + length :]


def forged(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_head_comes_back_bit_for_bit() -> None:
    head = random_head()
    found = unpack_head(pack_head(head), SHAPES)
    assert list(found) == sorted(SHAPES)
    assert all(np.array_equal(found[name], head[name]) for name in SHAPES)
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}


def test_the_bytes_depend_on_the_values_alone() -> None:
    head = random_head()
    turned = {name: np.asfortranarray(head[name]) for name in sorted(head, reverse=True)}
    assert pack_head(turned) == pack_head(head)


@pytest.mark.parametrize("name", ["bias", "a.very.long.name" * 20])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4)])
def test_every_shape_fits_its_budget(shape: tuple[int, ...], name: str) -> None:
    head = {name: np.ones(shape, np.float32)}
    packed = pack_head(head)
    assert len(packed) <= head_budget_bytes(head_shapes(head))
    assert np.array_equal(unpack_head(packed, {name: shape})[name], head[name])


def test_more_bytes_than_an_honest_head_takes_are_not_read() -> None:
    head = {**random_head(), "extra": np.zeros(2000, np.float32)}
    with pytest.raises(AdapterError, match=r"takes at most \d+ bytes; got \d+"):
        unpack_head(pack_head(head), SHAPES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"classifier.bias": np.zeros(4, np.float32)}, r"differs from the base model's in .*\(4,"),
        ({"classifier.weight": np.zeros((16, 3), np.float32)}, "differs from the base model's in"),
        (
            {"score.weight": np.zeros(1, np.float32)},
            r"the head differs from .*score.weight",
        ),
        ({"classifier.bias": np.zeros(3, np.float16)}, "classifier.bias .* float32; got float16"),
        ({"classifier.bias": np.zeros(3, np.int32)}, "classifier.bias .* float32; got int32"),
        ({"classifier.bias": np.zeros(3, np.float64)}, "classifier.bias .* float32; got float64"),
        ({"classifier.bias": np.float32([0, np.nan, 0])}, "classifier.bias .* are not finite"),
        ({"classifier.bias": np.float32([0, 0, -np.inf])}, "classifier.bias .* are not finite"),
    ],
)
def test_what_is_not_this_head_is_refused(change: dict[str, object], reason: str) -> None:
    packed = save({**random_head(), **change})
    with pytest.raises(AdapterError, match=reason):
        unpack_head(packed, SHAPES)


def test_a_head_without_one_of_its_arrays_is_refused() -> None:
    packed = pack_head({"classifier.bias": np.zeros(3, np.float32)})
    with pytest.raises(AdapterError, match=r"differs .* in \('classifier.weight', \(3, 16\)\)"):
        unpack_head(packed, SHAPES)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, -60, -1])
def test_cut_bytes_are_refused(length: int) -> None:
    with pytest.raises(AdapterError, match="is not in safetensors form"):
        unpack_head(pack_head(random_head())[:length], SHAPES)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4", "BOOL", "nonsense", None, 3])
def test_a_forged_number_format_is_refused(dtype: object) -> None:
    header, data = header_of(pack_head(random_head()))
    header["classifier.bias"]["dtype"] = dtype
    with pytest.raises(AdapterError):
        unpack_head(forged(header, data), SHAPES)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_a_number_format_of_the_right_size_is_refused(dtype: str) -> None:
    width = 2 if dtype == "BF16" else 1
    header = {"bias": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * width]}}
    with pytest.raises(AdapterError):
        unpack_head(forged(header, bytes(4 * width)), {"bias": (4,)})


@pytest.mark.parametrize("shape", [[2**62, 4], [-3], [3.0], "3", [0, 2**63], [2**64, 0]])
def test_a_forged_shape_is_refused(shape: object) -> None:
    header, data = header_of(pack_head(random_head()))
    header["classifier.bias"]["shape"] = shape
    with pytest.raises(AdapterError):
        unpack_head(forged(header, data), SHAPES)


@QUICK
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_overwritten_bytes_give_a_head_or_an_adapter_error(at: int, new: bytes) -> None:
    packed = pack_head(random_head())
    at = min(at, len(packed))
    try:
        found = unpack_head(packed[:at] + new + packed[at + len(new) :], SHAPES)
    except AdapterError:
        return
    assert head_shapes(found) == SHAPES
    assert all(np.isfinite(values).all() for values in found.values())


@QUICK
@given(st.binary(max_size=300))
def test_noise_is_refused(packed: bytes) -> None:
    with pytest.raises(AdapterError):
        unpack_head(packed, SHAPES)


@QUICK
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(0, 99))
def test_the_mean_is_that_of_float64(counts: list[int], seed: int) -> None:
    weights = [count / sum(counts) for count in counts]
    heads = [random_head(seed + k, size=10.0**k) for k in range(len(counts))]
    found = mean_of_heads(heads, weights)
    for name in SHAPES:
        stacked = np.stack([head[name].astype(np.float64) for head in heads])
        exact = np.tensordot(np.array(weights), stacked, axes=1)
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], exact, rtol=1e-6, atol=1e-7)


def test_the_mean_of_one_head_is_that_head() -> None:
    found = mean_of_heads([random_head()], [1.0])
    assert all(np.array_equal(found[name], random_head()[name]) for name in SHAPES)


def test_a_drawn_head_follows_the_seed_and_the_name() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "a.weight": (200, 50),
        "b.weight": (200, 50),
        "b.bias": (200,),
        "norm.weight": (50,),
    }
    first, again, other = (draw_head(shapes, seed) for seed in (7, 7, 8))
    turned = draw_head(dict(reversed(shapes.items())), 7)
    for name in shapes:
        assert np.array_equal(first[name], again[name])
        assert np.array_equal(first[name], turned[name])
    assert not np.array_equal(first["a.weight"], other["a.weight"])
    assert not np.array_equal(first["a.weight"], first["b.weight"])
    assert first["a.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert abs(first["a.weight"].mean()) < 1e-3
    assert not first["b.bias"].any()
    assert (first["norm.weight"] == 1).all()
    assert {values.dtype for values in first.values()} == {np.dtype(np.float32)}
