"""A warm start changes what is trained next, and leaves the global model where it was."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm
from strategies.registry import make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from strategies.warm_start import POLICIES, RANDOM, begin_next_round
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Dense, dense, dense_deltas, dense_sum, distance, double, leading
from tests.strategies.cohorts import (
    EQUAL,
    MIXED,
    SHAPES,
    assert_close,
    begun,
    model_after,
    replies_to,
    total,
)
from wire.codec import pack, unpack_delta

WARM = [policy for policy in POLICIES if policy != RANDOM]
over_methods = pytest.mark.parametrize(
    ("name", "energy"), [("flora", 1.0), ("flora", 0.5), ("florist", 1.0), ("florist", 0.7)]
)
over_ranks = pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal", "mixed"])
over_warm = pytest.mark.parametrize("policy", WARM)

OPEN = ("flora", "flora-warm", "florist")
"""The methods that leave open what a round begins from."""


def method(name: str, policy: str, energy: float = 1.0) -> Strategy:
    return make_strategy(name, policy=policy, energy=energy)


@over_methods
@over_ranks
@over_warm
def test_at_the_moment_of_the_start_the_global_model_is_that_of_a_random_one(
    name: str, energy: float, ranks: tuple[int, ...], policy: str
) -> None:
    random, warm = method(name, RANDOM, energy), method(name, policy, energy)
    model = begun(random, ranks)
    for seed in range(4):
        updates = replies_to(random, model, ranks, seed)
        expected = random.aggregate(model, Cohort(updates)).model
        found = warm.aggregate(model, Cohort(updates)).model
        assert_close(total(found), total(expected), 1e-6)
        assert found.state == expected.state == {"rank": max(ranks)}
        assert expected.start is None
        assert found.start is not None
        model = expected


@pytest.mark.parametrize("name", OPEN)
@over_ranks
@over_warm
def test_a_start_is_sorted_within_its_rank_and_as_long_as_fresh_rows(
    name: str, ranks: tuple[int, ...], policy: str
) -> None:
    for rounds in (1, 2, 4):
        model = model_after(method(name, policy), ranks, rounds)
        assert model.start is not None
        for module, f in model.start.items():
            assert f.rank == min(max(ranks), sum(ranks), *SHAPES[module])
            assert f.scale == 1.0
            np.testing.assert_allclose(np.linalg.norm(double(f.a), axis=1), 3**-0.5, rtol=1e-5)
            overlap = 3 * double(f.a) @ double(f.a).T - np.eye(f.rank)
            assert np.abs(overlap).max() < 1e-4  # the rows are orthogonal
            sizes = np.linalg.norm(double(f.b), axis=0)
            assert np.all(np.diff(sizes) <= 1e-6 * sizes[0])
            assert f.b.any() == (policy != "keep-a")


def test_a_drawn_row_is_as_long_as_one_of_a_warm_start() -> None:
    rows = draw({"q": (4, 3000)}, rank=8, seed=1, scale=1.0)["q"].a
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 3**-0.5, rtol=0.05)


def spanned(rows: Dense, onto: Dense) -> float:
    """How much of the first lies in the span of the second: 1 is all."""
    q, _ = np.linalg.qr(onto.T)
    return float(np.linalg.norm(rows @ q) / np.linalg.norm(rows))


@over_warm
def test_what_is_trained_next_are_the_leading_directions_that_the_policy_names(policy: str) -> None:
    strategy = method("flora", policy)
    before = model_after(strategy, MIXED, 2)
    updates = replies_to(strategy, before, MIXED, seed=9)
    after = strategy.aggregate(before, Cohort(updates)).model
    assert after.start is not None
    for module, whole in total(after).items():
        source = whole if policy == "global" else whole - total(before)[module]
        u, s, v = leading(source, MIXED[0])
        f = after.start[module]
        assert spanned(double(f.a), v) > 1.0 - 1e-6
        if policy != "keep-a":
            best = (u * s) @ v
            assert np.linalg.norm(dense(f) - best) <= 1e-5 * np.linalg.norm(best)


@pytest.mark.parametrize("name", OPEN)
@over_warm
def test_what_clients_keep_frozen_is_counted_once(name: str, policy: str) -> None:
    """total' = total + sum_k p_k (delta_k after - delta_k before), though each sends r_k only."""
    strategy = method(name, policy)
    model = model_after(strategy, MIXED, 1)
    for seed in (3, 4, 5):
        assert model.start is not None
        moved = {module: np.zeros(shape) for module, shape in SHAPES.items()}
        updates, free = (
            replies_to(strategy, model, MIXED, seed),
            replies_to(
                make_strategy("flora"), model_after(make_strategy("flora"), MIXED, 0), MIXED, seed
            ),
        )
        for rank, alone in zip(MIXED, free, strict=True):
            for module, f in model.start.items():
                trained = Factors(f.a[:rank], f.b[:, :rank], f.scale)
                moved[module] += alone.weight * (dense(alone.adapter[module]) - dense(trained))
        expected = {module: held + moved[module] for module, held in total(model).items()}
        model = strategy.aggregate(model, Cohort(updates)).model
        assert_close(total(model), expected, 1e-6)


def test_no_client_loses_a_direction_and_nothing_else_is_asked() -> None:
    for name in OPEN:
        for policy in POLICIES:
            strategy = method(name, policy)
            rule = strategy.local_rule(begun(strategy, MIXED), "anyone")
            assert rule.freezes_tail
            assert (rule.trains, rule.sends, rule.receives, rule.rank) == (
                "both",
                "both",
                "both",
                0,
            )


@pytest.mark.parametrize("policy", ["increment", "global"])
def test_where_all_fits_into_the_start_nothing_is_merged(policy: str) -> None:
    strategy = method("flora", policy)
    model = strategy.begin(draw(SHAPES, 16, 1, 1.0))
    update = Update("alone", 1.0, make_adapter(1, SHAPES, 3, 2.0))
    after = strategy.aggregate(model, Cohort([update])).model
    assert after.merged is not None
    assert after.start is not None
    assert {f.rank for f in after.merged.values()} == {0}
    assert {f.rank for f in after.start.values()} == {3}
    assert unpack_delta(pack(after.merged)).shapes == SHAPES
    assert distance(total(after), dense_deltas(update.adapter)) <= 1e-6 * norm(update.adapter)


@pytest.mark.parametrize("policy", ["keep-a", "increment"])
def test_rounding_is_not_taken_for_directions_of_the_increment(policy: str) -> None:
    """A small increment of rank 2 to a large model: its third direction is only rounding."""
    strategy = method("flora", policy)
    model = model_after(method("flora", RANDOM), MIXED, 3)
    small = make_adapter(1, SHAPES, 2, 0.01)
    after = strategy.aggregate(model, Cohort([Update("alone", 1.0, small)])).model
    assert after.start is not None
    assert {f.rank for f in after.start.values()} == {2}
    assert_close(total(after), dense_sum_of(model.total(), small), 1e-6)


def dense_sum_of(x: Adapter | None, y: Adapter) -> dict[str, Dense]:
    assert x is not None
    return dense_sum([x, y], [1.0, 1.0])


@over_warm
def test_where_nothing_moved_there_is_nothing_to_begin_from(policy: str) -> None:
    strategy = method("flora", policy)
    still = draw(SHAPES, 4, 1, 1.0)
    after = strategy.aggregate(strategy.begin(still), Cohort([Update("alone", 1.0, still)])).model
    assert after.start is not None
    assert {f.rank for f in after.start.values()} == {0}  # so that each client draws its own
    assert norm(after.start) == 0.0


def test_a_model_without_a_remembered_rank_begins_from_all_of_it() -> None:
    whole = make_adapter(1, SHAPES, 3)
    after = begin_next_round("global", GlobalModel(), whole)
    assert after.start is not None
    assert {f.rank for f in after.start.values()} == {3}
    assert_close(total(after), dense_deltas(whole), 1e-6)
