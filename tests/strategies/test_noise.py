"""Aggregation noise equals ||W_after - W_ideal|| / ||increment|| of whole float64 matrices."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm, stack
from strategies.noise import aggregation_noise
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import GlobalModel, Strategy, Update, ideal_increment
from tests.adapter_generators import PLAIN, QUICK, adapters, make_adapter
from tests.dense_oracle import Deltas, add, dense_deltas, dense_sum, distance, double, frobenius
from tests.strategies.cohorts import CONFIGURATIONS, begun, cohorts, replies_to
from tests.strategies.cohorts import SHAPES as COHORT_SHAPES

WITH_A_GLOBAL_MODEL = cohorts(
    {name: s for name, s in CONFIGURATIONS.items() if not s.properties.personal}
)
# As published, and with a start that is zero until a client moves it.
FROM_ZERO = cohorts(
    {
        name: CONFIGURATIONS[name]
        for name in STRATEGIES
        if not CONFIGURATIONS[name].properties.personal
        and not CONFIGURATIONS[name].properties.begins_from_base
    }
)
SHAPES = {"layers.1.q_proj": (8, 14), "layers.11.q_proj": (14, 8)}


def make_updates(scale: float = 1.0) -> list[Update]:
    weights = (0.5, 0.2, 0.3)
    return [
        Update(f"client-{k}", weight, make_adapter(k, SHAPES, 5, scale * (k + 1)))
        for k, weight in enumerate(weights)
    ]


def dense_noise(
    before: GlobalModel, after: GlobalModel, increment: Adapter
) -> tuple[float, dict[str, float]]:
    """In total and by module, from whole matrices."""
    ideal = add(dense_deltas(before.merged, like=increment), dense_deltas(increment))
    reached = dense_deltas(after.merged, like=increment)
    reached = add(reached, dense_deltas(after.start, like=increment))
    size = dense_deltas(increment)

    def one(name: str) -> float:
        return distance({name: reached[name]}, {name: ideal[name]}) / frobenius({name: size[name]})

    return distance(reached, ideal) / frobenius(size), {name: one(name) for name in size}


@st.composite
def models(draw: st.DrawFn) -> tuple[GlobalModel, GlobalModel, Adapter]:
    """Any model before, any after, and any increment, over the same modules."""
    part = adapters(SHAPES, kinds=PLAIN, ranks=[1, 2, 5, 8, 21])
    before = GlobalModel(draw(st.none() | part), draw(st.none() | part))
    return before, GlobalModel(draw(st.none() | part), draw(st.none() | part)), draw(part)


@QUICK
@given(models())
def test_noise_is_the_dense_formula_for_any_two_models(
    case: tuple[GlobalModel, GlobalModel, Adapter],
) -> None:
    before, after, increment = case
    total, modules = dense_noise(before, after, increment)
    noise = aggregation_noise(before, after, increment)
    assert noise.total == pytest.approx(total, rel=1e-6)
    assert noise.modules == pytest.approx(modules, rel=1e-6)


@pytest.mark.parametrize(("strategy", "ranks"), WITH_A_GLOBAL_MODEL)
def test_noise_of_a_strategy_is_the_dense_formula_and_about_0_where_exact(
    strategy: Strategy, ranks: tuple[int, ...]
) -> None:
    model = begun(strategy, ranks)
    for server_round in range(4):
        updates = replies_to(strategy, model, ranks, server_round)
        increment = ideal_increment(updates)
        after = strategy.aggregate(model, updates)
        noise = aggregation_noise(model, after, increment)
        total, modules = dense_noise(model, after, increment)
        assert noise.total == pytest.approx(total, rel=1e-5, abs=4e-6)
        assert noise.modules == pytest.approx(modules, rel=1e-5, abs=4e-6)
        assert (noise.total < 4e-6) == strategy.properties.exact
        model = after


def test_the_noise_of_fedavg_is_its_cross_terms() -> None:
    updates = make_updates()
    strategy = make_strategy("fedavg")
    before = strategy.begin(draw(SHAPES, 5, seed=1, scale=1.0))
    noise = aggregation_noise(before, strategy.aggregate(before, updates), ideal_increment(updates))
    # With b = s B:  sum_ij p_i p_j b_i A_j - sum_i p_i b_i A_i
    #             = -1/2 sum_ij p_i p_j (b_i - b_j)(A_i - A_j)
    distances: Deltas = {}
    for name, shape in SHAPES.items():
        total = np.zeros(shape)
        for left in updates:
            for right in updates:
                x, y = left.adapter[name], right.adapter[name]
                b = x.scale * double(x.b) - y.scale * double(y.b)
                total -= 0.5 * left.weight * right.weight * b @ (double(x.a) - double(y.a))
        distances[name] = total
    size = dense_sum([u.adapter for u in updates], [u.weight for u in updates])
    assert noise.total == pytest.approx(frobenius(distances) / frobenius(size), rel=1e-5)


def test_an_ideal_increment_is_the_weighted_sum_of_what_clients_trained() -> None:
    updates = make_updates()
    expected = dense_sum([u.adapter for u in updates], [u.weight for u in updates])
    found = dense_deltas(ideal_increment(updates))
    assert distance(found, expected) <= 1e-6 * frobenius(expected)


def test_a_global_model_is_merged_plus_start() -> None:
    x, y = make_adapter(1, SHAPES, 3, 2.0), make_adapter(2, SHAPES, 5, 0.5)
    both = GlobalModel(x, y).total()
    assert both is not None
    expected = dense_sum([x, y], [1.0, 1.0])
    assert distance(dense_deltas(both), expected) <= 1e-6 * frobenius(expected)
    assert GlobalModel().total() is None
    for only in (GlobalModel(merged=x), GlobalModel(start=x)):
        assert distance(dense_deltas(only.total()), dense_deltas(x)) <= 1e-6 * norm(x)


@pytest.mark.parametrize(("strategy", "ranks"), FROM_ZERO)
def test_a_module_that_no_client_moved_has_no_noise(
    strategy: Strategy, ranks: tuple[int, ...]
) -> None:
    still = "layers.1.q_proj"
    begin = begun(strategy, ranks)
    model = replace(begin, merged=make_adapter(9, COHORT_SHAPES, 3, 4.0))
    for seed in range(3):
        updates = [
            Update(u.client, u.weight, Adapter({**u.adapter, still: unmoved(u.adapter[still])}))
            for u in replies_to(strategy, model, ranks, seed)
        ]
        after = strategy.aggregate(model, updates)
        noise = aggregation_noise(model, after, ideal_increment(updates))
        assert noise.modules[still] == 0.0
        assert math.isfinite(noise.total)
        model = after


def unmoved(factors: Factors) -> Factors:
    return Factors(factors.a, np.zeros_like(factors.b), factors.scale)


def test_noise_without_any_increment_is_0_or_infinite() -> None:
    nothing = Adapter({name: unmoved(f) for name, f in make_adapter(1, SHAPES, 2).items()})
    something = make_adapter(2, SHAPES, 2)
    assert aggregation_noise(GlobalModel(), GlobalModel(), nothing).total == 0.0
    kept = stack([something, nothing], [1.0, 1.0])
    same = aggregation_noise(GlobalModel(something), GlobalModel(kept), nothing)
    assert (same.total, set(same.modules.values())) == (0.0, {0.0})
    for before, after in (
        (GlobalModel(), GlobalModel(something)),
        (GlobalModel(something), GlobalModel()),
    ):
        noise = aggregation_noise(before, after, nothing)
        assert (noise.total, set(noise.modules.values())) == (math.inf, {math.inf})
