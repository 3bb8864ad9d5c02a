"""A client starts from the truncated start at its own scale; what is missing is fresh."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from client.starting import starting_factors
from tests.adapter_generators import make_adapter
from tests.dense_oracle import dense

SHAPES = {"layers.0.q": (9, 7), "layers.0.up": (6, 12)}


def test_without_a_start_the_factors_are_fresh() -> None:
    fresh = starting_factors(None, SHAPES, rank=3, scale=2.0, seed=5)
    assert fresh.shapes == SHAPES
    for factors in fresh.values():
        assert (factors.rank, factors.scale) == (3, 2.0)
        assert not factors.b.any()
        assert factors.a.std() > 0.1
    other = starting_factors(None, SHAPES, rank=3, scale=2.0, seed=6)
    assert not np.array_equal(fresh["layers.0.q"].a, other["layers.0.q"].a)


@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_smaller_client_takes_the_first_rows_and_columns(rank: int, scale: float) -> None:
    start = make_adapter(0, SHAPES, rank=4, scale=1.5)
    own = starting_factors(start, SHAPES, rank, scale, seed=1)
    for name, factors in start.items():
        first = Factors(factors.a[:rank], factors.b[:, :rank], factors.scale)
        assert (own[name].rank, own[name].scale) == (rank, scale)
        assert np.array_equal(own[name].a, first.a)
        np.testing.assert_allclose(dense(own[name]), dense(first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.5, 0.3, 4.0])
def test_a_larger_client_adds_fresh_directions_that_change_no_delta(scale: float) -> None:
    start = make_adapter(0, SHAPES, rank=4, scale=1.5)
    own = starting_factors(start, SHAPES, rank=6, scale=scale, seed=1)
    fresh = draw(SHAPES, 6, seed=1, scale=scale)
    for name, factors in start.items():
        assert (own[name].rank, own[name].scale) == (6, scale)
        np.testing.assert_allclose(dense(own[name]), dense(factors), rtol=0, atol=1e-5)
        assert np.array_equal(own[name].a[:4], factors.a)
        assert np.array_equal(own[name].a[4:], fresh[name].a[4:])  # so that they can learn
        assert not own[name].b[:, 4:].any()


def test_modules_of_different_ranks_are_all_brought_to_the_clients() -> None:
    wide, narrow = make_adapter(0, SHAPES, 5), make_adapter(1, SHAPES, 1)
    start = Adapter({"layers.0.q": wide["layers.0.q"], "layers.0.up": narrow["layers.0.up"]})
    own = starting_factors(start, SHAPES, rank=3, scale=1.0, seed=0)
    assert {factors.rank for factors in own.values()} == {3}
    q = start["layers.0.q"]
    truncated = Factors(q.a[:3], q.b[:, :3], q.scale)
    np.testing.assert_allclose(dense(own["layers.0.q"]), dense(truncated), atol=1e-5)
    up = start["layers.0.up"]
    np.testing.assert_allclose(dense(own["layers.0.up"]), dense(up), atol=1e-5)


def test_the_start_is_copied_not_shared() -> None:
    start = make_adapter(0, SHAPES, rank=4)
    kept = {name: (f.a.copy(), f.b.copy()) for name, f in start.items()}
    for rank in (2, 4, 6):
        for factors in starting_factors(start, SHAPES, rank, 1.0, seed=0).values():
            factors.a[:] = 7.0
            factors.b[:] = 7.0
    for name, (a, b) in kept.items():
        assert np.array_equal(start[name].a, a)
        assert np.array_equal(start[name].b, b)
