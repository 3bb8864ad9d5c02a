"""The contract of every strategy: one table of strategies x invariants.

A new strategy joins with its line in `strategies.registry.STRATEGIES`. What it declares in its
`properties` decides at which ranks it is tested, and whether its result must be exact.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm
from adapters.codec import pack, unpack
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import GlobalModel, Strategy, Update, aggregation_noise, ideal_increment
from tests.adapter_generators import make_factors
from tests.dense_oracle import Deltas, add, dense_deltas, dense_sum, distance, frobenius

SHAPES = {"layers.1.q_proj": (8, 14), "layers.11.q_proj": (14, 8), "lm_head": (16, 5)}
LARGEST = 16  # the rank equals a dimension of one module and exceeds the others' smaller one
MIXED = (16, 5, 5, 1)
EQUAL = (5, 5, 5, 5)
EXAMPLES = (700, 20, 180, 100)

COHORTS = [
    pytest.param(name, ranks, id=f"{name}-{'mixed' if ranks is MIXED else 'equal'}")
    for name in STRATEGIES
    for ranks in (EQUAL, MIXED)
    if ranks is EQUAL or make_strategy(name).properties.mixed_ranks
]
over_cohorts = pytest.mark.parametrize(("name", "ranks"), COHORTS)
over_strategies = pytest.mark.parametrize("name", list(STRATEGIES))


def trained(seed: int, rank: int) -> Adapter:
    """What a client might send: its own scale rule, factors of ordinary size."""
    rng = np.random.default_rng(seed)
    scale = 16 / rank if seed % 2 else 8 / rank**0.5
    return Adapter({name: make_factors(rng, shape, rank, scale) for name, shape in SHAPES.items()})


def updates_of(ranks: Sequence[int], seed: int = 0) -> list[Update]:
    return [
        Update(f"client-{k}", examples / sum(EXAMPLES), trained(100 * seed + k, rank))
        for k, (rank, examples) in enumerate(zip(ranks, EXAMPLES, strict=True))
    ]


def begun(strategy: Strategy, ranks: Sequence[int]) -> GlobalModel:
    return strategy.begin(draw(SHAPES, max(ranks), seed=1, scale=1.0))


def model_after(strategy: Strategy, ranks: Sequence[int], rounds: int) -> GlobalModel:
    model = begun(strategy, ranks)
    for number in range(rounds):
        model = strategy.aggregate(model, updates_of(ranks, seed=number + 1))
    return model


def total(model: GlobalModel) -> Deltas:
    return dense_deltas(model.total(), like=trained(0, 1))


def frozen(model: GlobalModel) -> Deltas:
    return dense_deltas(model.merged, like=trained(0, 1))


def assert_close(x: Deltas, y: Deltas, relative: float = 2e-6) -> None:
    assert distance(x, y) <= relative * max(frobenius(x), frobenius(y))
    assert frobenius(y) > 0.0  # zeros would agree with each other for nothing


def packed(model: GlobalModel) -> list[bytes | None]:
    return [None if part is None else pack(part) for part in (model.merged, model.start)]


@over_cohorts
def test_it_begins_with_a_zero_delta(name: str, ranks: tuple[int, ...]) -> None:
    model = begun(make_strategy(name), ranks)
    assert all(norm(part) == 0.0 for part in (model.merged, model.start) if part is not None)
    assert frobenius(total(model)) == 0.0
    assert model.start is None or model.start.rank == max(ranks)


@over_cohorts
@pytest.mark.parametrize("rounds", [0, 2])
def test_the_order_of_clients_changes_no_more_than_rounding(
    name: str, ranks: tuple[int, ...], rounds: int
) -> None:
    strategy = make_strategy(name)
    before, updates = model_after(strategy, ranks, rounds), updates_of(ranks)
    expected = total(strategy.aggregate(before, updates))
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        assert_close(total(strategy.aggregate(before, [updates[k] for k in order])), expected)


@over_cohorts
def test_only_the_ratio_of_examples_matters(name: str, ranks: tuple[int, ...]) -> None:
    strategy, updates = make_strategy(name), updates_of(ranks)
    before = model_after(strategy, ranks, 1)
    many = [1000.0 * examples for examples in EXAMPLES]
    scaled = [
        replace(update, weight=count / sum(many))
        for update, count in zip(updates, many, strict=True)
    ]
    expected = total(strategy.aggregate(before, updates))
    assert_close(total(strategy.aggregate(before, scaled)), expected)
    other = [replace(update, weight=0.25) for update in updates]
    assert distance(total(strategy.aggregate(before, other)), expected) > 0.01 * frobenius(expected)


@over_cohorts
def test_a_client_split_in_two_counts_as_much_as_whole(name: str, ranks: tuple[int, ...]) -> None:
    strategy, (first, *others) = make_strategy(name), updates_of(ranks)
    before = model_after(strategy, ranks, 1)
    halves = [
        Update("left", 0.25 * first.weight, first.adapter),
        Update("right", 0.75 * first.weight, first.adapter),
    ]
    expected = total(strategy.aggregate(before, [first, *others]))
    assert_close(total(strategy.aggregate(before, [*halves, *others])), expected)


@over_cohorts
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("client", [0, 3])
def test_one_client_alone_is_the_identity(
    name: str, ranks: tuple[int, ...], rounds: int, client: int
) -> None:
    strategy = make_strategy(name)
    before = model_after(strategy, ranks, rounds)
    adapter = trained(7, ranks[client])
    after = strategy.aggregate(before, [Update("alone", 1.0, adapter)])
    assert_close(total(after), add(frozen(before), dense_deltas(adapter)))


@over_cohorts
@pytest.mark.parametrize("rounds", [0, 2])
def test_identical_clients_are_as_one_of_them(
    name: str, ranks: tuple[int, ...], rounds: int
) -> None:
    strategy = make_strategy(name)
    before, adapter = model_after(strategy, ranks, rounds), trained(7, ranks[0])
    alone = strategy.aggregate(before, [Update("one", 1.0, adapter)])
    updates = [Update(f"client-{k}", n / sum(EXAMPLES), adapter) for k, n in enumerate(EXAMPLES)]
    assert_close(total(strategy.aggregate(before, updates)), total(alone))


@over_strategies
def test_where_all_clients_agree_all_strategies_agree(name: str) -> None:
    strategy, adapter = make_strategy(name), trained(7, 5)
    updates = [Update(f"client-{k}", n / sum(EXAMPLES), adapter) for k, n in enumerate(EXAMPLES)]
    after = strategy.aggregate(begun(strategy, EQUAL), updates)
    assert_close(total(after), dense_deltas(adapter))


@over_cohorts
def test_neither_updates_nor_the_model_are_written_to(name: str, ranks: tuple[int, ...]) -> None:
    strategy, updates = make_strategy(name), updates_of(ranks)
    before = model_after(strategy, ranks, 2)
    parts = [part for part in (before.merged, before.start) if part is not None]
    adapters = [update.adapter for update in updates] + parts
    bytes_before = [pack(adapter) for adapter in adapters]
    for adapter in adapters:
        for factors in adapter.values():
            factors.a.setflags(write=False)
            factors.b.setflags(write=False)
    after = strategy.aggregate(before, updates)
    aggregation_noise(before, after, ideal_increment(updates))
    assert [pack(adapter) for adapter in adapters] == bytes_before
    assert packed(strategy.aggregate(before, updates)) == packed(after)


@over_cohorts
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_what_is_declared_exact_is_exact_and_the_rest_is_not(
    name: str, ranks: tuple[int, ...], rounds: int
) -> None:
    strategy, updates = make_strategy(name), updates_of(ranks)
    before = model_after(strategy, ranks, rounds)
    increment = dense_sum([u.adapter for u in updates], [u.weight for u in updates])
    ideal = add(frozen(before), increment)
    error = distance(total(strategy.aggregate(before, updates)), ideal)
    if strategy.properties.exact:
        assert error <= 1e-6 * frobenius(ideal)
    else:
        assert error >= 0.05 * frobenius(increment)  # or the declaration is too modest


@over_cohorts
def test_a_saved_model_is_the_same_bytes_and_goes_on_the_same(
    name: str, ranks: tuple[int, ...]
) -> None:
    strategy, updates = make_strategy(name), updates_of(ranks)
    model = model_after(strategy, ranks, 2)
    loaded = GlobalModel(*(None if part is None else unpack(part) for part in packed(model)))
    assert packed(loaded) == packed(model)
    assert packed(strategy.aggregate(loaded, updates)) == packed(strategy.aggregate(model, updates))


@over_cohorts
def test_modules_do_not_mix(name: str, ranks: tuple[int, ...]) -> None:
    strategy, updates = make_strategy(name), updates_of(ranks)
    after = total(strategy.aggregate(begun(strategy, ranks), updates))
    touched = "layers.11.q_proj"
    for k, update in enumerate(updates):
        factors = update.adapter[touched]
        doubled = Factors(factors.a, factors.b * np.float32(2.0), factors.scale)
        updates[k] = replace(update, adapter=Adapter({**update.adapter, touched: doubled}))
    changed = total(strategy.aggregate(begun(strategy, ranks), updates))
    for module in SHAPES:
        factor = 2.0 if module == touched else 1.0
        assert_close({module: changed[module]}, {module: factor * after[module]})


@over_strategies
def test_the_properties_are_complete(name: str) -> None:
    properties = make_strategy(name).properties
    assert properties.title
    assert properties.reveals
    assert "arXiv" in properties.source
