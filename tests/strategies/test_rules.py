"""What a method asks of clients, and whether it needs more of their replies than weighted sums."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors
from adapters.algebra import norm
from strategies.strategy import Cohort, Strategy
from tests.dense_oracle import distance, double
from tests.strategies.cohorts import (
    CONFIGURATIONS,
    assert_close,
    cohorts,
    model_after,
    obeying,
    replies_to,
    total,
    trained,
)
from wire.rules import BOTH

over_all = pytest.mark.parametrize(("strategy", "ranks"), cohorts(CONFIGURATIONS))
SHIFTED = (1, 2)  # of equal rank in both cohorts


@over_all
@pytest.mark.parametrize("rounds", [0, 1])
def test_what_needs_sums_only_sees_nothing_but_sums(
    strategy: Strategy, ranks: Sequence[int], rounds: int
) -> None:
    """Two clients move apart so that the weighted sums of A and of s B stay what they were."""
    before = model_after(strategy, ranks, rounds)
    updates = replies_to(strategy, before, ranks)
    apart = list(updates)
    for k, sign in zip(SHIFTED, (1.0, -1.0), strict=True):
        rule = strategy.local_rule(before, updates[k].client)
        modules = {}
        for n, f in updates[k].adapter.items():
            shift = trained(9, f.rank)[n]
            a = f.a + np.float32(sign / updates[k].weight / 10) * shift.a
            b = f.b + np.float32(sign / updates[k].weight / f.scale / 10) * shift.b
            modules[n] = Factors(a, b, f.scale)
        free = Adapter(modules)
        sees = obeying(replace(rule, freezes_tail=False), before.start, free)
        apart[k] = replace(updates[k], adapter=sees)
    after, shifted = (strategy.aggregate(before, Cohort(each)).model for each in (updates, apart))
    size = sum(norm(part) for part in (after.merged, after.start) if part is not None)
    if strategy.properties.personal:
        assert after.start is not None
        assert shifted.start is not None
        rows = [{n: double(f.a) for n, f in x.items()} for x in (shifted.start, after.start)]
        assert_close(rows[0], rows[1])
    elif strategy.properties.sums_only:
        assert_close(total(shifted), total(after))
    else:
        assert distance(total(shifted), total(after)) > 1e-3 * size


@over_all
def test_a_rule_is_one_that_a_client_can_follow(strategy: Strategy, ranks: Sequence[int]) -> None:
    for rounds in (0, 1, 2):
        model = model_after(strategy, ranks, rounds)
        rules = [strategy.local_rule(model, f"client-{k}") for k in range(len(ranks))]
        for rule in rules:
            assert {rule.trains, rule.sends, rule.receives} <= {"A", "B", BOTH}
            assert rule.sends in (rule.trains, BOTH) or rule.keeps_b
            assert rule.keeps_b == strategy.properties.personal
            assert 0 <= rule.rank <= max(ranks)
            assert 0.0 < rule.prune <= 1.0
            assert rule.penalty >= 0.0
        # One broadcast serves the whole cohort.
        assert len({rule.receives for rule in rules}) == 1
        assert len({rule.freezes_tail for rule in rules}) == 1
