"""What averaging factors does in one round: its cross terms, and when they vanish."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import truncate
from strategies.registry import make_strategy
from strategies.strategy import Cohort, GlobalModel, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import (
    dense_deltas,
    dense_sum,
    distance,
    double,
    frobenius,
    mean_of_padded_factors,
)
from tests.strategies.rounds import EQUAL, MIXED, SHAPES, Client, train

WEIGHTS = [0.5, 0.2, 0.3]
AVERAGING = [
    pytest.param("fedavg", EQUAL, id="fedavg-equal"),
    pytest.param("zero-padding", EQUAL, id="zero-padding-equal"),
    pytest.param("zero-padding", MIXED, id="zero-padding-mixed"),
]


def updates_of(clients: list[Client], seed: int = 0) -> list[Update]:
    """What these clients send after a round from fresh factors."""
    flora, fresh = make_strategy("flora"), draw(SHAPES, 8, 0, 1.0)
    return [
        Update(c.name, weight, train(flora, GlobalModel(), c, fresh, [seed, k]))
        for k, (c, weight) in enumerate(zip(clients, WEIGHTS, strict=True))
    ]


@pytest.mark.parametrize(("name", "clients"), AVERAGING)
@pytest.mark.parametrize("start_rank", [8, 2])  # above and below the clients' ranks
def test_one_round_of_averaging_is_the_sum_of_its_cross_terms(
    name: str, clients: list[Client], start_rank: int
) -> None:
    strategy, updates = make_strategy(name), updates_of(clients)
    model = strategy.begin(draw(SHAPES, start_rank, seed=3, scale=1.0))
    expected = dict(mean_of_padded_factors([u.adapter for u in updates], WEIGHTS))
    after = strategy.aggregate(model, Cohort(updates)).model
    assert distance(dense_deltas(after.total()), expected) <= 1e-6 * frobenius(expected)


def sharing_rows(clients: list[Client]) -> list[Update]:
    """Clients whose A is the first rows of one A, as under FFA-LoRA."""
    shared, step, updates = draw(SHAPES, 8, seed=4, scale=1.0), np.random.default_rng(5), []
    for client, weight in zip(clients, WEIGHTS, strict=True):
        modules = {}
        for module, f in truncate(shared, client.rank).items():
            b = step.normal(size=f.b.shape).astype(np.float32)
            modules[module] = Factors(f.a, b, client.scale)
        updates.append(Update(client.name, weight, Adapter(modules)))
    return updates


@pytest.mark.parametrize(("name", "clients"), AVERAGING)
def test_averaging_is_exact_where_the_clients_share_their_rows(
    name: str, clients: list[Client]
) -> None:
    updates, shared = sharing_rows(clients), draw(SHAPES, 8, seed=4, scale=1.0)
    model = make_strategy(name).begin(truncate(shared, max(client.rank for client in clients)))
    after = dense_deltas(make_strategy(name).aggregate(model, Cohort(updates)).model.total())
    same_rank = len({client.rank for client in clients}) == 1
    expected = dense_sum([u.adapter for u in updates], WEIGHTS)
    error = distance(after, expected) / frobenius(expected)
    assert error <= 1e-6 if same_rank else error > 0.05  # the zeros still dilute


def test_a_direction_that_no_present_client_has_stays_as_it_was_under_rbla() -> None:
    strategy = make_strategy("rbla")
    before = GlobalModel(start=make_adapter(5, SHAPES, 8, 3.0))
    small = [u for u in updates_of(MIXED, seed=1) if u.client == "small"]
    after = strategy.aggregate(before, Cohort([Update("small", 1.0, small[0].adapter)])).model
    assert before.start is not None
    assert after.start is not None
    for name, f in after.start.items():
        sent, was = small[0].adapter[name], before.start[name]
        assert np.array_equal(f.a[2:], was.a[2:])
        np.testing.assert_allclose(f.b[:, 2:], 3.0 * double(was.b[:, 2:]), rtol=1e-6)
        assert f.scale == 1.0
        np.testing.assert_allclose(f.a[:2], sent.a, rtol=1e-6)
        np.testing.assert_allclose(f.b[:, :2], sent.scale * double(sent.b), rtol=1e-6)
        assert was.b[:, 2:].any()


def test_zeros_overwrite_a_direction_that_no_present_client_has_under_padding() -> None:
    updates = updates_of(MIXED)
    for name in ("zero-padding", "hetlora", "lora-fair"):
        strategy = make_strategy(name)
        before = strategy.aggregate(strategy.begin(draw(SHAPES, 8, 3, 1.0)), Cohort(updates)).model
        after = strategy.aggregate(before, Cohort([Update("small", 1.0, updates[1].adapter)])).model
        assert after.start is not None
        assert after.start.rank == 8
        assert not any(f.a[2:].any() or f.b[:, 2:].any() for f in after.start.values())


def test_hetlora_weighs_by_p_k_times_the_size_of_the_delta() -> None:
    strategy = make_strategy("hetlora")
    before, updates = strategy.begin(draw(SHAPES, 8, 3, 1.0)), updates_of(MIXED)
    sizes = [u.weight * frobenius(dense_deltas(u.adapter)) for u in updates]
    shares = [size / sum(sizes) for size in sizes]
    expected = dict(mean_of_padded_factors([u.adapter for u in updates], shares))
    after = dense_deltas(strategy.aggregate(before, Cohort(updates)).model.total())
    assert distance(after, expected) <= 1e-6 * frobenius(expected)
    assert max(abs(s - w) for s, w in zip(shares, WEIGHTS, strict=True)) > 0.1


def test_hetlora_remembers_the_rank_of_clients_that_are_absent() -> None:
    strategy, updates = make_strategy("hetlora"), updates_of(MIXED)
    model = strategy.aggregate(strategy.begin(draw(SHAPES, 8, 3, 1.0)), Cohort(updates)).model
    assert model.state == {"big": 8, "small": 2, "middle": 6}
    pruned = Update("big", 1.0, truncate(updates[0].adapter, 7))
    model = strategy.aggregate(model, Cohort([pruned])).model
    assert model.state == {"big": 7, "small": 2, "middle": 6}
    asked = [strategy.local_rule(model, c).rank for c in ("big", "small", "middle", "new")]
    assert asked == [7, 2, 6, 0]


def test_hetlora_where_nobody_moved_keeps_the_weights_of_the_round() -> None:
    still = [
        Update(
            u.client,
            u.weight,
            Adapter({n: Factors(f.a, 0 * f.b, f.scale) for n, f in u.adapter.items()}),
        )
        for u in updates_of(EQUAL)
    ]
    before = draw(SHAPES, 4, 3, 1.0)
    het, plain = (
        make_strategy(n).aggregate(make_strategy(n).begin(before), Cohort(still)).model.start
        for n in ("hetlora", "zero-padding")
    )
    assert het is not None
    assert plain is not None
    for name, f in het.items():
        assert np.array_equal(f.a, plain[name].a)
        assert f.a.any()
