"""The wire form: bit-exact, always the same bytes, readable by others, rounded as torch rounds."""

import hashlib
import itertools
import struct

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Delta, Dense, Factors, draw
from adapters.algebra import truncate
from adapters.number_formats import WIRE_DTYPES
from core.errors import AdapterError
from tests.adapter_generators import PLAIN, QUICK, RANKS, adapters, make_adapter, shapes
from tests.dense_oracle import double
from wire.codec import budget_bytes, pack, unpack, unpack_delta

SHAPES = {"layers.1.q_proj": (6, 4), "layers.11.q_proj": (3, 9)}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def assert_same_bits(x: Adapter, y: Adapter) -> None:
    assert list(x) == list(y)
    for name in x:
        assert x[name].scale == y[name].scale
        assert np.array_equal(bits(x[name].a), bits(y[name].a))
        assert np.array_equal(bits(x[name].b), bits(y[name].b))


def column(values: npt.NDArray[np.float32]) -> Adapter:
    """An adapter that carries these values as its A."""
    return Adapter({"q": Factors(values[None], np.zeros((1, 1), np.float32), 1.0)})


def finite_floats(seed: int, count: int) -> npt.NDArray[np.float32]:
    """Any bit pattern of float32 that is a finite number: denormals, both zeros, the largest."""
    values = np.random.default_rng(seed).integers(0, 2**32, count, np.uint32).view(np.float32)
    values[~np.isfinite(values)] = np.float32(-0.0)
    return values


@st.composite
def any_adapter(draw: st.DrawFn) -> Adapter:
    names = draw(st.lists(st.text(min_size=0, max_size=12), min_size=1, max_size=4, unique=True))
    modules = {}
    for name in names:
        m, n, r = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 7))
        values = finite_floats(draw(st.integers(0, 2**32)), r * (m + n))
        scale = draw(st.floats(allow_nan=False, allow_infinity=False))
        modules[name] = Factors(values[: r * n].reshape(r, n), values[r * n :].reshape(m, r), scale)
    return Adapter(modules)


@QUICK
@given(any_adapter())
def test_float32_comes_back_bit_for_bit(adapter: Adapter) -> None:
    packed = pack(adapter)
    assert_same_bits(unpack(packed), adapter)
    assert pack(unpack(packed)) == packed


@QUICK
@given(adapters(kinds=PLAIN), st.sampled_from(list(WIRE_DTYPES)))
def test_packing_again_gives_the_same_bytes(adapter: Adapter, dtype: str) -> None:
    packed = pack(adapter, dtype)
    assert pack(adapter, dtype) == packed
    assert pack(unpack(packed), dtype) == packed


def test_the_bytes_do_not_change_from_release_to_release() -> None:
    packed = pack(draw(SHAPES, 2, seed=1, scale=0.5))
    expected = "205ac52210b6552793623657902d38d20076991faea457748d06b61445c435b2"
    assert hashlib.sha256(packed).hexdigest() == expected


def test_neither_the_order_of_modules_nor_the_memory_layout_changes_the_bytes() -> None:
    adapter = make_adapter(1, SHAPES, 5, 2.0)
    laid_out = {
        name: Factors(np.asfortranarray(f.a), np.asfortranarray(f.b), f.scale)
        for name, f in sorted(adapter.items(), reverse=True)
    }
    assert pack(Adapter(laid_out)) == pack(adapter)
    cut = truncate(adapter, 2)  # views into the larger factors
    copied = {name: Factors(f.a.copy(), f.b.copy(), f.scale) for name, f in cut.items()}
    assert pack(cut) == pack(Adapter(copied))


@QUICK
@given(adapters())
def test_the_safetensors_library_reads_the_bytes(adapter: Adapter) -> None:
    tensors = safetensors.numpy.load(pack(adapter))
    assert sorted(tensors) == sorted(f"{n}.lora_{half}" for n in adapter for half in "AB")
    for name, factors in adapter.items():
        assert np.array_equal(bits(tensors[f"{name}.lora_A"]), bits(factors.a))
        assert np.array_equal(bits(tensors[f"{name}.lora_B"]), bits(factors.b))


def assert_rounds_as_torch(values: npt.NDArray[np.float32], dtype: str) -> None:
    expected = torch.from_numpy(values).to(HALVES[dtype])
    packed = pack(column(values), dtype)
    sent = safetensors.torch.load(packed)["q.lora_A"][0]
    assert sent.dtype == HALVES[dtype]
    assert torch.equal(sent.view(torch.int16), expected.view(torch.int16))
    received = unpack(packed)["q"].a[0]
    assert np.array_equal(bits(received), bits(expected.to(torch.float32).numpy()))


def around(halves: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each value, the tie above it, and the floats on both sides of these."""
    ties = (double(halves[:-1]) + double(halves[1:])) / 2
    points = np.concatenate([halves, ties.astype(np.float32)])
    up, down = np.float32(np.inf), np.float32(-np.inf)
    near = np.concatenate([points, np.nextafter(points, up), np.nextafter(points, down)])
    return np.concatenate([near, -near]).astype(np.float32)


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 0x7F7F), ("float16", 0x7BFF)])
def test_every_half_value_every_tie_and_their_neighbours_round_as_in_torch(
    dtype: str, largest: int
) -> None:
    codes = torch.arange(largest + 1, dtype=torch.int16)  # all that are finite and not negative
    halves = codes.view(HALVES[dtype]).to(torch.float32).numpy()
    values = around(halves)
    assert_rounds_as_torch(values[np.abs(values) <= halves[-1]], dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_random_bit_patterns_round_as_in_torch(dtype: str) -> None:
    values = finite_floats(3, 200_000)
    assert_rounds_as_torch(values[np.abs(values) <= torch.finfo(HALVES[dtype]).max], dtype)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("bfloat16", 0x7F7F8000),  # the first float32 that rounds to infinity
        ("bfloat16", 0xFF7F8000),
        ("float16", 0x477FF000),  # 65520, likewise
        ("float16", 0xC77FF000),
    ],
)
def test_values_too_large_for_a_half_are_refused(dtype: str, pattern: int) -> None:
    value = np.array([1.0, 0.0], np.float32)
    value.view(np.uint32)[1] = pattern
    with pytest.raises(AdapterError, match=rf"q\.lora_A holds values too large for {dtype}"):
        pack(column(value), dtype)
    value.view(np.uint32)[1] = pattern - 1
    assert np.isfinite(unpack(pack(column(value), dtype))["q"].a).all()


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_value_that_is_not_finite_never_becomes_a_number(dtype: str, pattern: int) -> None:
    value = np.array([pattern], np.uint32).view(np.float32)
    with pytest.raises(AdapterError, match=f"too large for {dtype} or not finite: send float32"):
        pack(column(value), dtype)


def test_half_precision_takes_half_the_bytes() -> None:
    adapter = make_adapter(4, {"q": (64, 64)}, 8)
    full, brain, half = (len(pack(adapter, d)) for d in ("float32", "bfloat16", "float16"))
    data = adapter.num_parameters * 2
    assert (full - brain, full - half) == pytest.approx((data, data), abs=32)


@QUICK
@given(shapes(), st.sampled_from(RANKS), st.sampled_from(list(WIRE_DTYPES)))
def test_an_honest_adapter_fits_its_budget(
    over: dict[str, tuple[int, int]], rank: int, dtype: str
) -> None:
    packed = pack(draw(over, rank, seed=5, scale=16 / 3), dtype)
    assert len(packed) <= budget_bytes(over, rank, dtype)


@pytest.mark.parametrize("shape", [(3, 2000), (2000, 3), (1, 1)])
def test_a_rank_above_the_dimensions_fits_its_budget_too(shape: tuple[int, int]) -> None:
    packed = pack(draw({"q": shape}, 64, seed=5, scale=16 / 3))
    assert len(packed) <= budget_bytes({"q": shape}, 64)
    assert len(packed) > budget_bytes({"q": shape}, 43) or shape == (1, 1)


def test_the_budget_grows_with_rank_shape_and_width_and_with_nothing_else() -> None:
    over = {"q": (300, 200), "v": (100, 50)}
    base = budget_bytes(over, 0)
    assert budget_bytes(over, 7) - base == 4 * 7 * (300 + 200 + 100 + 50)
    assert budget_bytes(over, 7, "bfloat16") - base == 2 * 7 * (300 + 200 + 100 + 50)
    assert base <= 1024 * 6


def test_the_header_is_padded_to_eight_bytes() -> None:
    for length in range(1, 9):
        packed = pack(make_adapter(6, {"x" * length: (2, 3)}, 1))
        assert struct.unpack("<Q", packed[:8])[0] % 8 == 0


@pytest.mark.parametrize("dtype", ["float64", "F32", "", "bf16"])
def test_an_unknown_wire_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(
        AdapterError, match=f"one of float32, bfloat16, float16, int8; got '{dtype}'"
    ):
        pack(make_adapter(7, SHAPES, 2), dtype)


def test_an_adapter_without_modules_is_not_sent() -> None:
    with pytest.raises(AdapterError, match="no module in this adapter: nothing to send"):
        pack(Adapter({}))


def test_packing_does_not_write_to_the_adapter() -> None:
    adapter = make_adapter(8, SHAPES, 3)
    for array in itertools.chain.from_iterable((f.a, f.b) for f in adapter.values()):
        array.setflags(write=False)
    for dtype in WIRE_DTYPES:
        pack(adapter, dtype)


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_what_was_unpacked_does_not_hold_on_to_the_message(dtype: str) -> None:
    received = unpack(pack(make_adapter(9, SHAPES, 3), dtype))
    assert all(f.a.flags.writeable and f.b.flags.writeable for f in received.values())


def with_dense(seed: int) -> Delta:
    """One module in factors with a scale of its own, one dense."""
    factors = make_adapter(seed, SHAPES, 2, 0.5)
    dense = Dense(np.random.default_rng(seed).standard_normal((3, 9), np.float32))
    return Delta({**factors, "layers.11.q_proj": dense})


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_a_dense_module_comes_back_and_packs_to_the_same_bytes(dtype: str) -> None:
    delta = with_dense(1)
    packed = pack(delta, dtype)
    came = unpack_delta(packed)
    assert pack(came, dtype) == packed == pack(delta, dtype)
    sent, found = delta["layers.11.q_proj"], came["layers.11.q_proj"]
    assert isinstance(sent, Dense)
    assert isinstance(found, Dense)
    assert np.allclose(found.values, sent.values, rtol=0.0, atol=0.02 * np.abs(sent.values).max())
    assert np.array_equal(found.values, sent.values) == (dtype == "float32")
    factors = came["layers.1.q_proj"]
    assert isinstance(factors, Factors)
    assert factors.scale == 0.5
    whole = Delta({name: Dense(np.ones(shape, np.float32)) for name, shape in SHAPES.items()})
    assert list(unpack_delta(pack(whole, dtype))) == list(SHAPES)


def test_a_dense_module_is_one_tensor_that_the_safetensors_library_reads() -> None:
    delta = with_dense(2)
    tensors = safetensors.numpy.load(pack(delta))
    assert sorted(tensors) == [
        "layers.1.q_proj.lora_A",
        "layers.1.q_proj.lora_B",
        "layers.11.q_proj.delta",
    ]
    sent = delta["layers.11.q_proj"]
    assert isinstance(sent, Dense)
    assert np.array_equal(tensors["layers.11.q_proj.delta"], sent.values)


def test_a_module_whose_name_ends_like_a_dense_tensor_is_no_dense_one() -> None:
    adapter = make_adapter(3, {"q.delta": (4, 3), "q": (3, 4)}, 2, 0.5)
    assert_same_bits(unpack(pack(adapter)), adapter)


def test_what_is_not_a_client_s_adapter_is_refused_as_one() -> None:
    with pytest.raises(AdapterError, match="is a dense delta, where factors were expected"):
        unpack(pack(with_dense(1)))
