"""Rounding does not add up: hundreds of rounds later a model is what float64 says it is.

A mean formed in float32 is wrong by the same 7e-8 in every round in which nothing moves; summed up,
that is 3e-5 of the factors after 500 rounds.
"""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors
from adapters.algebra import norm, rescale
from strategies.registry import make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import dense_deltas, distance, double, frobenius
from tests.strategies.cohorts import CONFIGURATIONS, EQUAL, SHAPES, model_after, total, trained

ROUNDS = 300
SHARES = (0.35, 0.12, 0.33, 0.2)
SCALES = (16 / 3, 0.7, 2.0, 8 / 5**0.5)
STEADY = {
    name: strategy
    for name, strategy in CONFIGURATIONS.items()
    if not (strategy.properties.personal or strategy.properties.steps)
    and getattr(strategy, "energy", 1.0) == 1.0
}


def as_it_began(model: GlobalModel, scale: float, seed: int) -> Adapter:
    """What a client sends that trained nothing: the start at its own scale, or fresh with B = 0."""
    if model.start is not None:
        return rescale(model.start, scale)
    fresh = trained(seed, EQUAL[0])
    return Adapter({n: Factors(f.a, np.zeros_like(f.b), scale) for n, f in fresh.items()})


def size(model: GlobalModel) -> float:
    return sum(norm(part) for part in (model.merged, model.start) if part is not None)


@pytest.mark.parametrize("strategy", STEADY.values(), ids=list(STEADY))
def test_a_model_that_nobody_moves_stays(strategy: Strategy) -> None:
    model = model_after(strategy, EQUAL, 2)
    expected, whole = total(model), size(model)
    for _ in range(ROUNDS):
        updates = [
            Update(f"client-{k}", share, as_it_began(model, scale, k))
            for k, (share, scale) in enumerate(zip(SHARES, SCALES, strict=True))
        ]
        model = strategy.aggregate(model, Cohort(updates)).model
    assert distance(total(model), expected) <= 2e-6 * whole


def test_frlora_is_exactly_the_base_as_long_as_nobody_moves() -> None:
    strategy = make_strategy("frlora")
    model = strategy.begin(make_adapter(3, SHAPES, 4))
    for number in range(5):
        updates = [
            Update(f"client-{k}", share, as_it_began(model, scale, number))
            for k, (share, scale) in enumerate(zip(SHARES, SCALES, strict=True))
        ]
        before, model = model, strategy.aggregate(model, Cohort(updates)).model
        assert model.merged is before.merged
    assert model.start is not None
    assert frobenius(total(model)) <= 1e-14 * norm(model.start)


@pytest.mark.parametrize("step", [1e-3, 0.1])
def test_frlora_follows_float64_over_hundreds_of_rounds(step: float) -> None:
    strategy, rng = make_strategy("frlora"), np.random.default_rng(5)
    begin = make_adapter(3, SHAPES, 4)
    model = strategy.begin(begin)
    moved = {name: np.zeros(SHAPES[name]) for name in begin}
    for _ in range(ROUNDS):
        updates, means = [], {}
        for k, (share, scale) in enumerate(zip(SHARES, SCALES, strict=True)):
            modules = {}
            for name, f in rescale(begin, scale).items():
                a = f.a + step * rng.standard_normal(f.a.shape, dtype=np.float32)
                b = f.b + step * rng.standard_normal(f.b.shape, dtype=np.float32)
                modules[name] = Factors(a, b, scale)
                d_a, d_b = share * (double(a) - f.a), share * scale * (double(b) - f.b)
                old_a, old_b = means.get(name, (0.0, 0.0))
                means[name] = (old_a + d_a, old_b + d_b)
            updates.append(Update(f"client-{k}", share, Adapter(modules)))
        for name in moved:
            d_a, d_b = means[name]
            a, b = double(begin[name].a), begin[name].scale * double(begin[name].b)
            moved[name] += (b + d_b) @ (a + d_a) - b @ a
        model = strategy.aggregate(model, Cohort(updates)).model
    whole = frobenius(dense_deltas(begin))
    assert distance(total(model), moved) <= 1e-6 * (whole + frobenius(moved))
    assert frobenius(moved) > 0.01 * whole
