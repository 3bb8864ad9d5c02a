"""Aggregation noise, sizes and ranks of a round against whole float64 matrices."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm
from strategies.noise import Compared, compare, ideal_change
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from tests.adapter_generators import PLAIN, QUICK, adapters, make_adapter
from tests.dense_oracle import (
    Deltas,
    add,
    dense_deltas,
    dense_sum,
    distance,
    double,
    frobenius,
    singular_values,
)
from tests.strategies.cohorts import CONFIGURATIONS, begun, cohorts, replies_to
from tests.strategies.cohorts import SHAPES as COHORT_SHAPES
from tests.strategies.rounds import CASES, MEMBERS, Client, Played
from tests.strategies.test_rounds import TABLE

# As published, and with a start that is zero until a client moves it.
FROM_ZERO = cohorts(
    {
        name: CONFIGURATIONS[name]
        for name in STRATEGIES
        if not CONFIGURATIONS[name].properties.personal
        and not CONFIGURATIONS[name].properties.begins_from_base
        and name != "flora-warm"  # moves what was merged into the start
    }
)
SHAPES = {"layers.1.q_proj": (8, 14), "layers.11.q_proj": (14, 8)}


def make_updates(scale: float = 1.0) -> list[Update]:
    weights = (0.5, 0.2, 0.3)
    return [
        Update(f"client-{k}", weight, make_adapter(k, SHAPES, 5, scale * (k + 1)))
        for k, weight in enumerate(weights)
    ]


def dense_effective_rank(delta: Deltas) -> float:
    """The mean over modules of exp of the entropy of the singular values."""
    found = []
    for values in delta.values():
        shares = singular_values(values) / singular_values(values).sum()
        shares = shares[shares > 1e-12]
        found.append(float(np.exp(-(shares * np.log(shares)).sum())))
    return float(np.mean(found))


@pytest.mark.parametrize(("name", "clients"), TABLE)
def test_the_noise_of_every_round_of_every_strategy_is_that_of_the_papers_formula(
    name: str, clients: list[Client]
) -> None:
    """Nothing of the oracle's side comes from the code: neither models, nor starts, nor changes."""
    played = Played(CASES[name], clients)
    for number in range(len(MEMBERS)):
        played.round(number)
        ideal = {
            n: sum(p * played.changes[k][n] for k, p in played.shares.items()) for n in played.moved
        }
        apart = add(played.moved, ideal, -1.0)
        began = played.before.start
        found = compare(
            played.before, played.model, ideal_change(Cohort(played.updates), began, played.ranks)
        )
        rounding = 10 * CASES[name].tolerance * frobenius(played.oracle.delta()) / frobenius(ideal)
        assert found.noise == pytest.approx(frobenius(apart) / frobenius(ideal), abs=rounding)
        assert found.size == pytest.approx(frobenius(ideal), rel=rounding)
        assert found.effective_rank == pytest.approx(dense_effective_rank(ideal), rel=1e-3)
        for n, noise in found.modules.items():
            wanted = np.linalg.norm(apart[n]) / np.linalg.norm(ideal[n])
            assert noise == pytest.approx(wanted, abs=4 * rounding)
        if CASES[name].strategy.properties.exact:
            assert frobenius(apart) <= 1e-9 * frobenius(ideal)
        distances = found.relative_to_model or 0.0
        model = frobenius(played.oracle.delta())
        assert distances == pytest.approx(frobenius(apart) / model, abs=10 * CASES[name].tolerance)


def dense_noise(
    before: GlobalModel, after: GlobalModel, trained: Adapter, began: Adapter | None
) -> tuple[float, float]:
    """||(G_after - G_before) - change|| and ||change||, of one client."""
    change = add(dense_deltas(trained), dense_deltas(began, like=trained), -1.0)
    moved = change
    for sign, model in ((-1.0, after), (1.0, before)):
        for part in (model.merged, model.start):
            moved = add(moved, dense_deltas(part, like=trained), sign)
    return frobenius(moved), frobenius(change)


@st.composite
def models(draw: st.DrawFn) -> tuple[GlobalModel, GlobalModel, Adapter]:
    """Any model before, any after, and any reply, over the same modules."""
    part = adapters(SHAPES, kinds=PLAIN, ranks=[1, 2, 5, 8, 21])
    before = GlobalModel(draw(st.none() | part), draw(st.none() | part))
    return before, GlobalModel(draw(st.none() | part), draw(st.none() | part)), draw(part)


@QUICK
@given(models())
def test_noise_is_the_dense_formula_for_any_two_models(
    case: tuple[GlobalModel, GlobalModel, Adapter],
) -> None:
    before, after, trained = case
    ranks = [before.start.rank if before.start else 0]
    found = compare(
        before, after, ideal_change(Cohort([Update("one", 1.0, trained)]), before.start, ranks)
    )
    apart, size = dense_noise(before, after, trained, before.start)
    rounding = 1e-6  # such as where the model after is what was trained
    wanted = pytest.approx(apart / size, rel=1e-5, abs=rounding) if size else None
    assert found.noise == wanted
    assert found.size == pytest.approx(size, rel=1e-5)


def test_the_noise_of_fedavg_is_its_cross_terms() -> None:
    updates = make_updates()
    strategy = make_strategy("fedavg")
    before = strategy.begin(draw(SHAPES, 5, seed=1, scale=1.0))
    after = strategy.aggregate(before, Cohort(updates)).model
    found = compare(before, after, ideal_change(Cohort(updates), before.start))
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
    assert found.noise == pytest.approx(frobenius(distances) / frobenius(size), rel=1e-5)


def test_a_sum_is_formed_once_however_many_ask_for_it() -> None:
    updates = Cohort(make_updates())
    assert updates.total is updates.total


def test_an_ideal_increment_is_the_weighted_sum_of_what_clients_trained() -> None:
    updates = make_updates()
    expected = dense_sum([u.adapter for u in updates], [u.weight for u in updates])
    found = dense_deltas(Cohort(updates).total)
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
        after = strategy.aggregate(model, Cohort(updates)).model
        seen = [model.start.rank if model.start else 0] * len(updates)
        found = compare(model, after, ideal_change(Cohort(updates), model.start, seen))
        assert found.modules[still] is None
        assert found.sizes[still] == 0.0
        assert found.noise is not None
        model = after


def unmoved(factors: Factors) -> Factors:
    return Factors(factors.a, np.zeros_like(factors.b), factors.scale)


def nothing_of(found: Compared) -> bool:
    return found.noise is found.effective_rank is None and set(found.modules.values()) == {None}


def test_of_a_round_that_changed_nothing_there_is_no_noise_to_tell() -> None:
    nothing = Adapter({name: unmoved(f) for name, f in make_adapter(1, SHAPES, 2).items()})
    something = make_adapter(2, SHAPES, 2)
    idle = ideal_change(Cohort([Update("idle", 1.0, nothing)]), None)
    assert nothing_of(compare(GlobalModel(), GlobalModel(), idle))
    assert nothing_of(compare(GlobalModel(), GlobalModel(something), idle))
    assert compare(GlobalModel(), GlobalModel(something), idle).relative_to_model == 1.0


def test_the_rounding_of_a_start_that_came_back_is_no_change() -> None:
    start = make_adapter(2, SHAPES, 3, 2.0)
    back = Adapter({n: Factors(f.a / 3, f.b * np.float32(3), f.scale) for n, f in start.items()})
    before, after = GlobalModel(start=start), GlobalModel(start=back)
    found = compare(before, after, ideal_change(Cohort([Update("idle", 1.0, back)]), start))
    assert nothing_of(found)
    assert found.size == 0.0
