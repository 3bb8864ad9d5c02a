"""The terms of merged against dense float64 matrices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Delta, Dense, Factors
from adapters.terms import MINUS, PLUS, STEP, Term, stepped, sum_of_terms
from core.errors import AdapterError
from tests.adapter_generators import make_adapter
from tests.dense_oracle import add, dense_deltas, distance, double, frobenius

SHAPES = {"q": (6, 9), "v": (5, 4)}


def step_of(start: Adapter, seed: int, size: float) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for name, f in start.items():
        a = size * rng.standard_normal(f.a.shape, dtype=np.float32)
        modules[name] = Factors(a, size * rng.standard_normal(f.b.shape, dtype=np.float32), f.scale)
    return Adapter(modules)


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 4), size=st.floats(1e-6, 10.0))
def test_a_step_is_the_difference_of_two_products(seed: int, rank: int, size: float) -> None:
    start = make_adapter(seed, SHAPES, rank, 0.7)
    step = step_of(start, seed, size)
    expected = {
        name: f.scale
        * (
            (double(f.b) + double(step[name].b)) @ (double(f.a) + double(step[name].a))
            - double(f.b) @ double(f.a)
        )
        for name, f in start.items()
    }
    found = stepped(start, step)
    assert found.rank == 2 * rank
    assert distance(dense_deltas(found), expected) <= 1e-6 * frobenius(expected)


def test_terms_add_up_in_any_form() -> None:
    start, one = make_adapter(1, SHAPES, 2, 0.5), make_adapter(2, SHAPES, 3, 1.5)
    dense = Delta({n: Dense(np.ones(shape, np.float32)) for n, shape in SHAPES.items()})
    step = step_of(start, 3, 0.1)
    terms = [Term(MINUS, start), Term(PLUS, one), Term(STEP, step), Term(PLUS, dense)]
    expected = add(dense_deltas(one), dense_deltas(start), -1.0)
    expected = add(expected, dense_deltas(stepped(start, step)))
    expected = {name: delta + 1.0 for name, delta in expected.items()}
    found = sum_of_terms(terms, start)
    assert found is not None
    assert distance(dense_deltas(found), expected) <= 1e-6 * frobenius(expected)


def test_no_terms_are_nothing_and_a_step_of_nothing_is_refused() -> None:
    start = make_adapter(1, SHAPES, 2, 0.5)
    assert sum_of_terms([]) is None
    with pytest.raises(AdapterError, match="a step needs the start"):
        sum_of_terms([Term(STEP, start)])
    for other in (make_adapter(1, SHAPES, 3, 0.5), make_adapter(1, SHAPES, 2, 1.0)):
        with pytest.raises(AdapterError, match=r"q: a step needs factors of the rank and scale"):
            stepped(start, other)
