"""The contract of every strategy: one table of strategies x invariants.

A new strategy joins with its line in `strategies.registry.STRATEGIES`. What it declares in its
`properties` decides at which ranks it is tested, whether its result must be exact, and whether it
has a global model at all: invariants of that model leave personal methods out.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adapters.adapter import Adapter, Delta, Dense, Factors
from adapters.algebra import beyond, norm
from adapters.terms import sum_of_terms
from strategies.noise import compare, ideal_change
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from tests.dense_oracle import Deltas, add, dense_deltas, dense_sum, distance, frobenius
from tests.strategies.cohorts import (
    CONFIGURATIONS,
    EQUAL,
    EXAMPLES,
    MIXED,
    assert_close,
    begun,
    cohorts,
    frozen,
    made_of,
    model_after,
    packed,
    reloaded,
    replies_to,
    reply_of,
    total,
)
from wire.codec import pack

GLOBAL = {n: s for n, s in CONFIGURATIONS.items() if not s.properties.personal}


def cuts(strategy: Strategy) -> bool:
    """Its model is not the clients' mean, on purpose, not even that of one client alone."""
    return bool(getattr(strategy, "energy", 1.0) < 1.0) or strategy.properties.steps


over_all = pytest.mark.parametrize(("strategy", "ranks"), cohorts(CONFIGURATIONS))
over_global = pytest.mark.parametrize(("strategy", "ranks"), cohorts(GLOBAL))
over_uncut = pytest.mark.parametrize(
    ("strategy", "ranks"), cohorts({n: s for n, s in GLOBAL.items() if not cuts(s)})
)


def alone(strategy: Strategy, before: GlobalModel, update: Update) -> Deltas:
    """What one client's reply makes of the global model: W + merged + its delta."""
    expected = add(frozen(before), dense_deltas(update.adapter))
    if strategy.properties.keeps_untouched and before.start is not None:
        # The directions that it lacks stay as they were: the one method with a memory for them.
        untouched = dense_deltas(beyond(before.start, update.adapter.rank))
        expected = add(expected, untouched)
    return expected


def cohort_of_one(update: Update) -> list[Update]:
    """The same reply from everyone."""
    return [
        replace(update, client=f"client-{k}", weight=count / sum(EXAMPLES))
        for k, count in enumerate(EXAMPLES)
    ]


@over_all
def test_it_begins_with_a_zero_delta(strategy: Strategy, ranks: Sequence[int]) -> None:
    model = begun(strategy, ranks)
    assert model.start is None or model.start.rank == max(ranks)
    if strategy.properties.begins_from_base:  # what start holds is taken out of the base
        assert model.start is not None
        assert frobenius(total(model)) <= 1e-6 * norm(model.start)
    else:
        assert all(norm(part) == 0.0 for part in (model.merged, model.start) if part is not None)
        assert frobenius(total(model)) == 0.0


@over_global
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_order_of_clients_changes_no_more_than_rounding(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    updates = replies_to(strategy, before, ranks)
    expected = total(strategy.aggregate(before, Cohort(updates)).model)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        assert_close(
            total(strategy.aggregate(before, Cohort([updates[k] for k in order])).model), expected
        )


@over_global
@pytest.mark.parametrize("rounds", [0, 1])
def test_only_the_ratio_of_examples_matters(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    updates = replies_to(strategy, before, ranks)
    many = [1000.0 * examples for examples in EXAMPLES]
    scaled = [
        replace(update, weight=count / sum(many))
        for update, count in zip(updates, many, strict=True)
    ]
    expected = total(strategy.aggregate(before, Cohort(updates)).model)
    assert_close(total(strategy.aggregate(before, Cohort(scaled)).model), expected)
    other = [replace(update, weight=0.25) for update in updates]
    assert distance(
        total(strategy.aggregate(before, Cohort(other)).model), expected
    ) > 0.01 * frobenius(expected)


@over_global
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_client_split_in_two_counts_as_much_as_whole(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    first, *others = replies_to(strategy, before, ranks)
    halves = [
        Update("left", 0.25 * first.weight, first.adapter),
        Update("right", 0.75 * first.weight, first.adapter),
    ]
    expected = total(strategy.aggregate(before, Cohort([first, *others])).model)
    assert_close(total(strategy.aggregate(before, Cohort([*halves, *others])).model), expected)


@over_uncut
@pytest.mark.parametrize("rounds", [0, 2, 3])
@pytest.mark.parametrize("client", [0, 3])
def test_one_client_alone_is_the_identity(
    strategy: Strategy, ranks: Sequence[int], rounds: int, client: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    update = reply_of(strategy, before, f"client-{client}", ranks[client], seed=7)
    after = strategy.aggregate(before, Cohort([update])).model
    assert_close(total(after), alone(strategy, before, update))


@over_global
@pytest.mark.parametrize("rounds", [0, 2])
def test_identical_clients_are_as_one_of_them(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    update = reply_of(strategy, before, "client-0", ranks[0], seed=7)
    expected = total(strategy.aggregate(before, Cohort([update])).model)
    assert_close(total(strategy.aggregate(before, Cohort(cohort_of_one(update))).model), expected)


@over_uncut
def test_where_all_clients_agree_all_strategies_agree(
    strategy: Strategy, ranks: Sequence[int]
) -> None:
    before = begun(strategy, ranks)
    update = reply_of(strategy, before, "client-0", ranks[0], seed=7)
    after = strategy.aggregate(before, Cohort(cohort_of_one(update))).model
    assert_close(total(after), add(frozen(before), dense_deltas(update.adapter)))


@over_all
def test_neither_updates_nor_the_model_are_written_to(
    strategy: Strategy, ranks: Sequence[int]
) -> None:
    before = model_after(strategy, ranks, 2)
    updates = replies_to(strategy, before, ranks)
    parts = [part for part in (before.merged, before.start) if part is not None]
    adapters: list[Delta] = [*(update.adapter for update in updates), *parts]
    bytes_before, memory = [pack(adapter) for adapter in adapters], dict(before.state)
    for adapter in adapters:
        for form in adapter.values():
            for array in (form.values,) if isinstance(form, Dense) else (form.a, form.b):
                array.setflags(write=False)
    after = strategy.aggregate(before, Cohort(updates)).model
    compare(before, after, ideal_change(Cohort(updates), before.start))
    assert [pack(adapter) for adapter in adapters] == bytes_before
    assert before.state == memory
    assert packed(strategy.aggregate(before, Cohort(updates)).model) == packed(after)


@over_global
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_what_is_declared_exact_is_exact_and_the_rest_is_not(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    before = model_after(strategy, ranks, rounds)
    updates = replies_to(strategy, before, ranks)
    increment = dense_sum([u.adapter for u in updates], [u.weight for u in updates])
    ideal = add(frozen(before), increment)
    error = distance(total(strategy.aggregate(before, Cohort(updates)).model), ideal)
    if strategy.properties.exact:
        assert error <= 1e-6 * frobenius(ideal)
    else:
        assert error >= 0.02 * frobenius(increment)  # or the declaration is too modest


@over_all
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_saved_model_is_the_same_bytes_and_goes_on_the_same(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    model = model_after(strategy, ranks, rounds)
    loaded = reloaded(model)
    assert packed(loaded) == packed(model)
    for k in range(len(ranks)):
        client = f"client-{k}"
        assert strategy.local_rule(loaded, client) == strategy.local_rule(model, client)
    updates = replies_to(strategy, model, ranks)
    assert packed(strategy.aggregate(loaded, Cohort(updates)).model) == packed(
        strategy.aggregate(model, Cohort(updates)).model
    )


@over_global
def test_modules_do_not_mix(strategy: Strategy, ranks: Sequence[int]) -> None:
    """The sign, not the size, of one module is changed: a client's size may weigh in all of it."""
    before, touched = begun(strategy, ranks), "layers.11.q_proj"
    updates = replies_to(strategy, before, ranks)
    after = total(strategy.aggregate(before, Cohort(updates)).model)
    for k, update in enumerate(updates):
        factors = update.adapter[touched]
        negated = Factors(factors.a, -factors.b, factors.scale)
        updates[k] = replace(update, adapter=Adapter({**update.adapter, touched: negated}))
    changed = total(strategy.aggregate(before, Cohort(updates)).model)
    for module, held in frozen(before).items():
        sign = -1.0 if module == touched else 1.0
        expected = held + sign * (after[module] - held)
        assert_close({module: changed[module]}, {module: expected})


@over_all
def test_what_no_client_moved_can_still_be_trained(
    strategy: Strategy, ranks: Sequence[int]
) -> None:
    """Where A and B are both zero no gradient ever comes; no direction at all would be drawn."""
    still, before = "layers.1.q_proj", begun(strategy, ranks)
    for seed in (1, 2):
        updates = [
            replace(u, adapter=Adapter({**u.adapter, still: as_it_began(before, u.adapter[still])}))
            for u in replies_to(strategy, before, ranks, seed)
        ]
        before = strategy.aggregate(before, Cohort(updates)).model
    if before.start is not None and before.start[still].rank > 0:
        assert np.linalg.norm(before.start[still].a[0]) > 0.1


def as_it_began(model: GlobalModel, sent: Factors) -> Factors:
    """What comes back from a client that trained nothing, with A as drawn or as in start."""
    if model.start is None:
        return Factors(sent.a, np.zeros_like(sent.b), sent.scale)
    a, b = sent.a.copy(), np.zeros_like(sent.b)
    old = model.start["layers.1.q_proj"]
    both = min(old.rank, sent.rank)
    a[:both], b[:, :both] = old.a[:both], old.b[:, :both] * np.float32(old.scale / sent.scale)
    return Factors(a, b, sent.scale)


def test_both_cohorts_and_personal_methods_are_in_the_table() -> None:
    assert any(values[1] is MIXED for values in (p.values for p in cohorts(CONFIGURATIONS)))  # type: ignore[attr-defined]
    assert 0 < len(GLOBAL) < len(CONFIGURATIONS)


TELL = {
    name: strategy
    for name, strategy in CONFIGURATIONS.items()
    if made_of(strategy, begun(strategy, EQUAL), EQUAL, seed=1).gained is not None
}
"""The methods that say what merged gains, and not only what it is."""


@pytest.mark.parametrize(("strategy", "ranks"), cohorts(TELL))
def test_what_it_says_it_adds_to_merged_is_what_it_adds(
    strategy: Strategy, ranks: Sequence[int]
) -> None:
    before = begun(strategy, ranks)
    for number in range(1, 4):
        made = made_of(strategy, before, ranks, seed=number)
        assert made.gained is not None
        gained = add(frozen(made.model), frozen(before), -1.0)
        rounding = 1e-5 * (frobenius(total(made.model)) + frobenius(total(before)))
        told = sum_of_terms(made.gained, made.model.start)
        assert told is not None
        assert distance(dense_deltas(told), gained) <= rounding
        before = made.model


def test_methods_that_tell_what_merged_gains_are_there() -> None:
    assert {"flora", "florist", "fedex-lora", "frlora"} <= set(TELL)
