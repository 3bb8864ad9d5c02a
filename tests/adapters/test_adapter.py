"""The adapter as a value: what it refuses, how it is ordered, and how fresh factors are drawn."""

import dataclasses
import re

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors, draw, same_shapes
from adapters.algebra import norm
from core.errors import AdapterError, BouquetError, UsageError, listing
from tests.adapter_generators import QUICK, RANKS, make_adapter, shapes
from tests.dense_oracle import double
from wire.codec import pack

Shapes = dict[str, tuple[int, int]]
SHAPES = {"v_proj": (4, 16), "q_proj": (16, 16)}


def zeros(*shape: int) -> npt.NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (zeros(2, 5), zeros(3, 4)),
        (zeros(5), zeros(3, 5)),
        (zeros(2, 5), zeros(2)),
        (zeros(2, 5, 1), zeros(3, 2)),
        (zeros(0, 5), zeros(3, 1)),
    ],
)
def test_factors_whose_shapes_do_not_fit_are_refused(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]
) -> None:
    message = f"A (r, n) and B (m, r) with the same r; got A {a.shape} and B {b.shape}"
    with pytest.raises(AdapterError, match=re.escape(message)):
        Factors(a, b, 1.0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_factors_of_another_dtype_are_refused(dtype: type) -> None:
    name = np.dtype(dtype).name
    with pytest.raises(AdapterError, match=f"in float32; got A {name} and B float32"):
        Factors(zeros(2, 5).astype(dtype), zeros(3, 2), 1.0)
    with pytest.raises(AdapterError, match=f"in float32; got A float32 and B {name}"):
        Factors(zeros(2, 5), zeros(3, 2).astype(dtype), 1.0)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_refused(scale: float) -> None:
    with pytest.raises(AdapterError, match=f"scale of factors must be finite; got {scale}"):
        Factors(zeros(2, 5), zeros(3, 2), scale)


def test_the_order_of_modules_does_not_depend_on_how_they_came() -> None:
    adapter = make_adapter(0, SHAPES, 3)
    backwards = Adapter({name: adapter[name] for name in sorted(adapter, reverse=True)})
    assert list(adapter) == list(backwards) == ["q_proj", "v_proj"]
    assert pack(adapter) == pack(backwards)


def test_rank_shapes_and_parameters_of_mixed_modules() -> None:
    adapter = Adapter({"v": Factors(zeros(2, 5), zeros(3, 2), 1.0), **make_adapter(0, SHAPES, 7)})
    assert adapter.rank == 7
    assert adapter.shapes == {"q_proj": (16, 16), "v": (3, 5), "v_proj": (4, 16)}
    assert adapter.num_parameters == 2 * 8 + 7 * 20 + 7 * 32
    assert repr(adapter) == "Adapter(3 modules, rank 7, 380 parameters)"
    assert (Adapter({}).rank, Adapter({}).num_parameters) == (0, 0)


def test_adapters_and_factors_are_immutable() -> None:
    modules = dict(make_adapter(0, SHAPES, 3))
    adapter = Adapter(modules)
    modules.clear()
    assert len(adapter) == 2
    with pytest.raises(TypeError):
        adapter["q_proj"] = adapter["v_proj"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter["q_proj"].scale = 2.0  # type: ignore[misc]


def test_same_shapes_names_the_modules_that_differ() -> None:
    x, y = make_adapter(0, SHAPES, 2), make_adapter(0, {**SHAPES, "v_proj": (4, 15)}, 2)
    assert same_shapes([x, make_adapter(1, SHAPES, 5)]) == SHAPES
    both = r"adapter 2 differs .*'v_proj', \(4, 15\).*'v_proj', \(4, 16\)"
    with pytest.raises(AdapterError, match=both):
        same_shapes([x, x, y])
    with pytest.raises(AdapterError, match=r"differs from adapter 0 in \('v_proj', \(4, 16\)\)$"):
        same_shapes([x, Adapter({"q_proj": x["q_proj"]})])


def test_same_shapes_cuts_a_long_list_of_differences() -> None:
    many = make_adapter(0, {f"layers.{i}": (2, 2) for i in range(64)}, 1)
    with pytest.raises(AdapterError, match=r"'layers\.0'.*\(showing 5 of 64\)$"):
        same_shapes([many, Adapter({})])


def test_same_shapes_needs_an_adapter() -> None:
    with pytest.raises(AdapterError, match="expected at least one adapter; got none"):
        same_shapes([])


@QUICK
@given(shapes(), st.sampled_from(RANKS), st.integers(0, 2**64))
def test_draw_is_within_its_bound_with_a_zero_delta(over: Shapes, rank: int, seed: int) -> None:
    fresh = draw(over, rank, seed, scale=2.5)
    assert norm(fresh) == 0.0
    assert fresh.shapes == over
    for name, (m, n) in over.items():
        a, b, scale = fresh[name].a, fresh[name].b, fresh[name].scale
        assert (a.shape, b.shape, scale) == ((rank, n), (m, rank), 2.5)
        assert np.all(np.abs(double(a)) <= (1 + 1e-6) / np.sqrt(n))
        assert not b.any()


def test_draw_fills_its_bound_evenly() -> None:
    a = double(draw({"q": (1, 400)}, 500, seed=1, scale=1.0)["q"].a) * np.sqrt(400)
    assert -1.0 <= a.min() < -0.9999 < 0.9999 < a.max() <= 1.0 + 1e-6
    counts, _ = np.histogram(a, bins=20, range=(-1, 1.000001))
    assert np.all(np.abs(counts - 10_000) < 500)  # five standard deviations


def test_draw_gives_the_same_bytes_for_the_same_seed_only() -> None:
    bytes_of = [pack(draw(SHAPES, 4, seed, 1.0)) for seed in (7, 7, 8, 7 + 2**32)]
    assert bytes_of[0] == bytes_of[1]
    assert len(set(bytes_of)) == 3


def test_draw_is_the_same_on_every_platform_and_release() -> None:
    fresh = draw({"layers.0.q_proj": (2, 4)}, 1, seed=2024, scale=1.0)
    expected = [[0xBEBEEEA2, 0x3D51C870, 0x3EB9DB24, 0xBE9CD734]]
    assert fresh["layers.0.q_proj"].a.view(np.uint32).tolist() == expected


@QUICK
@given(shapes(), st.integers(0, 2**32), st.sampled_from([1, 3, 8]))
def test_drawing_a_module_does_not_depend_on_the_others(over: Shapes, seed: int, rank: int) -> None:
    together = draw(over, rank, seed, 1.0)
    for name, shape in over.items():
        alone = draw({name: shape}, rank, seed, 1.0)[name]
        assert np.array_equal(alone.a, together[name].a)


def test_modules_are_drawn_independently_of_each_other() -> None:
    names = ["layers.1.q", "layers.11.q", "layers.1.k", "q", "1.layers.q"]
    fresh = draw(dict.fromkeys(names, (1, 50)), 80, seed=3, scale=1.0)
    correlation = np.corrcoef([fresh[name].a.ravel() for name in names])
    assert np.all(np.abs(correlation - np.eye(len(names))) < 0.08)  # five standard deviations


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    short, long = (draw(SHAPES, rank, 5, 1.0)["q_proj"].a for rank in (3, 9))
    assert np.array_equal(long[:3], short)


def test_the_exceptions_and_their_exit_codes() -> None:
    assert (BouquetError.exit_code, AdapterError.exit_code, UsageError.exit_code) == (1, 1, 2)
    assert issubclass(AdapterError, BouquetError)
    assert issubclass(UsageError, BouquetError)
    assert listing(range(6), limit=6) == "0, 1, 2, 3, 4, 5"
    assert listing(range(7), limit=6) == "0, 1, 2, 3, 4, 5 (showing 6 of 7)"
