"""Where one method becomes another: equal ranks, shared factors, extreme options, many rounds."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import rescale
from strategies.registry import make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, dense_deltas, dense_sum, distance, double, frobenius
from tests.strategies.rounds import EQUAL, MEMBERS, MIXED, SHAPES, Client, shares_of, train

LARGE = {"layers.1.q_proj": (40, 30), "layers.11.q_proj": (30, 50)}


def updates_of(*ranks: int, seed: int = 0) -> list[Update]:
    weights = np.arange(1, len(ranks) + 1) / sum(range(len(ranks) + 1))
    return [
        Update(f"client-{k}", float(p), make_adapter(10 * seed + k, LARGE, r, 16 / r))
        for k, (r, p) in enumerate(zip(ranks, weights, strict=True))
    ]


def after(strategy: Strategy, updates: list[Update], rank: int = 0) -> GlobalModel:
    largest = rank or max(u.adapter.rank for u in updates)
    return strategy.aggregate(strategy.begin(draw(LARGE, largest, 1, 1.0)), Cohort(updates)).model


def total(model: GlobalModel) -> Deltas:
    return dense_deltas(model.total())


def ideal(updates: list[Update]) -> Deltas:
    return dense_sum([u.adapter for u in updates], [u.weight for u in updates])


def assert_same(x: Deltas, y: Deltas, tolerance: float = 1e-6) -> None:
    assert frobenius(y) > 0.0
    assert distance(x, y) <= tolerance * frobenius(y)


@pytest.mark.parametrize("name", ["zero-padding", "rbla"])
def test_at_equal_ranks_padding_and_rank_based_averages_are_fedavg(name: str) -> None:
    updates = updates_of(4, 4, 4)
    assert_same(
        total(after(make_strategy(name), updates)), total(after(make_strategy("fedavg"), updates))
    )


@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 2, 5)])
def test_florist_that_keeps_everything_is_flora(ranks: tuple[int, ...]) -> None:
    florist, flora = make_strategy("florist", energy=1.0), make_strategy("flora")
    models = [florist.begin(draw(LARGE, 8, 1, 1.0)), flora.begin(draw(LARGE, 8, 1, 1.0))]
    for seed in range(4):
        updates = updates_of(*ranks, seed=seed)
        models = [
            florist.aggregate(models[0], Cohort(updates)).model,
            flora.aggregate(models[1], Cohort(updates)).model,
        ]
        assert_same(total(models[0]), total(models[1]))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 2, 5)])
def test_lora_fair_with_an_endless_ridge_is_zero_padding(ranks: tuple[int, ...]) -> None:
    updates = updates_of(*ranks)
    strong = make_strategy("lora-fair", ridge=1e12)
    assert_same(total(after(strong, updates)), total(after(make_strategy("zero-padding"), updates)))


@pytest.mark.parametrize("start_rank", [8, 35])  # 35 rows of A in 30 columns
def test_lora_fair_without_a_ridge_has_the_best_b_for_its_a(start_rank: int) -> None:
    updates = updates_of(8, 2, 5)
    free = make_strategy("lora-fair", ridge=0.0)
    found = after(free, updates, start_rank)
    assert found.start is not None
    for name, wanted in ideal(updates).items():
        a = double(found.start[name].a)
        best = np.linalg.lstsq(a.T, wanted.T, rcond=1e-10)[0].T @ a
        assert_same({name: total(found)[name]}, {name: best})


def test_lora_fair_comes_nearer_the_smaller_its_ridge() -> None:
    updates = updates_of(8, 2, 5)
    errors = [
        distance(total(after(make_strategy("lora-fair", ridge=r), updates)), ideal(updates))
        for r in (0.0, 1e-2, 1.0, 100.0)
    ]
    assert all(x < y for x, y in pairwise(errors))


def test_hetlora_at_equal_norms_is_zero_padding() -> None:
    updates = [replace(u, adapter=of_norm_one(u.adapter)) for u in updates_of(8, 2, 5)]
    assert_same(
        total(after(make_strategy("hetlora"), updates)),
        total(after(make_strategy("zero-padding"), updates)),
    )


def of_norm_one(adapter: Adapter) -> Adapter:
    size = frobenius(dense_deltas(adapter))
    return Adapter({n: Factors(f.a, f.b, f.scale / size) for n, f in adapter.items()})


def test_hetlora_asks_for_pruning_unless_its_share_is_one() -> None:
    for prune, asked in ((1.0, 1.0), (0.5, 0.5)):
        strategy = make_strategy("hetlora", prune=prune, penalty=0.125, min_rank=3)
        model = after(strategy, updates_of(8, 2, 5))
        rule = strategy.local_rule(model, "client-0")
        assert (rule.prune, rule.penalty, rule.rank, rule.min_rank) == (asked, 0.125, 8, 3)


@pytest.mark.parametrize(("start_rank", "exact"), [(15, True), (30, True), (14, False), (8, False)])
def test_flexlora_is_exact_once_its_rank_is_the_sum_of_ranks(start_rank: int, exact: bool) -> None:
    updates = updates_of(8, 2, 5)
    found = total(after(make_strategy("flexlora"), updates, start_rank))
    error = distance(found, ideal(updates)) / frobenius(ideal(updates))
    assert error <= 1e-6 if exact else error > 1e-3
    if exact:
        assert_same(found, total(after(make_strategy("ideal"), updates)))


def test_with_one_a_for_all_fedavg_is_ffa_lora_and_exact() -> None:
    shared = draw(LARGE, 4, 1, 1.0)
    updates = [
        replace(
            u,
            adapter=Adapter({n: Factors(shared[n].a, f.b, f.scale) for n, f in u.adapter.items()}),
        )
        for u in updates_of(4, 4, 4)
    ]
    found = [
        total(after(make_strategy(name), updates)) for name in ("ffa-lora", "fedavg", "rolora")
    ]
    for each in found:
        assert_same(each, ideal(updates))


def test_rolora_takes_turns_and_changes_one_factor_at_a_time() -> None:
    strategy = make_strategy("rolora")
    model = strategy.begin(draw(LARGE, 4, 1, 1.0))
    for number in range(5):
        turn = "BA"[number % 2]
        rule = strategy.local_rule(model, "anyone")
        assert (rule.trains, rule.sends, rule.receives) == (turn, turn, "both")
        new = strategy.aggregate(model, Cohort(updates_of(4, 4, 4, seed=number))).model
        assert model.start is not None
        assert new.start is not None
        for name, f in new.start.items():
            was = model.start[name]
            assert np.array_equal(f.a, was.a) == (turn == "B")
            assert np.array_equal(f.scale * f.b, was.scale * was.b) == (turn == "A")
        model = new


def test_ffa_lora_never_changes_a_and_sends_b_alone() -> None:
    strategy = make_strategy("ffa-lora")
    begin = draw(LARGE, 4, 1, 2.0)
    model = strategy.begin(begin)
    for number in range(3):
        rule = strategy.local_rule(model, "anyone")
        assert (rule.trains, rule.sends, rule.receives) == ("B", "B", "B")
        model = strategy.aggregate(model, Cohort(updates_of(4, 4, 4, seed=number))).model
        assert model.start is not None
        assert all(np.array_equal(f.a, begin[n].a) for n, f in model.start.items())


def test_frlora_begins_every_round_from_the_same_factors() -> None:
    strategy, base = make_strategy("frlora"), make_adapter(7, LARGE, 4, 2.0)
    model = strategy.begin(base)
    for number in range(3):
        model = strategy.aggregate(model, Cohort(updates_of(4, 4, 4, seed=number))).model
        assert model.start is base
        still = [Update("x", 1.0, rescale(base, 0.5))]
        assert_same(total(strategy.aggregate(model, Cohort(still)).model), total(model))


@pytest.mark.parametrize("clients", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_flora_is_the_dense_mean_over_many_rounds(clients: list[Client]) -> None:
    flora, dense = make_strategy("flora"), make_strategy("ideal")
    exact = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    models = [GlobalModel(), GlobalModel()]
    for number in range(30):
        fresh = draw(SHAPES, 8, seed=number, scale=1.0)
        present = [clients[k] for k in MEMBERS[number % len(MEMBERS)]]
        updates = [
            Update(c.name, share, train(flora, GlobalModel(), c, fresh, [number, k]))
            for k, (c, share) in enumerate(zip(present, shares_of(present).values(), strict=True))
        ]
        models = [
            flora.aggregate(models[0], Cohort(updates)).model,
            dense.aggregate(models[1], Cohort(updates)).model,
        ]
        for name, delta in dense_sum(
            [u.adapter for u in updates], [u.weight for u in updates]
        ).items():
            exact[name] = exact[name] + delta
        assert models[0].merged is not None
        for module, factors in models[0].merged.items():
            assert factors.rank <= min(SHAPES[module])
    for model in models:
        assert_same(total(model), exact)
    assert_same(total(models[0]), total(models[1]))
