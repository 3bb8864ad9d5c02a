"""A round of low ranks alone, in which nobody trains anything: who still has the old model?"""

from pathlib import Path

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors
from adapters.algebra import beyond, rescale, stack, truncate
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from tests.dense_oracle import Deltas, distance, frobenius
from tests.strategies.cohorts import asked_rank, model_after, total, trained

RANKS = (16, 8, 4, 4)
MIXED = [name for name in STRATEGIES if make_strategy(name).properties.mixed_ranks]


def untrained(strategy: Strategy, model: GlobalModel, client: str, rank: int) -> Adapter:
    """What this client sends, with what it kept frozen, where it trained nothing."""
    rule = strategy.local_rule(model, client)
    rank = asked_rank(rule, rank)
    if model.start is None:
        fresh = trained(1, rank)
        return Adapter({n: Factors(f.a, np.zeros_like(f.b), f.scale) for n, f in fresh.items()})
    own = rescale(truncate(model.start, rank), 16 / rank)
    if rule.freezes_tail and model.start.rank > rank:
        return stack([own, beyond(model.start, rank)], [1.0, 1.0])
    return own


def share_left(strategy: Strategy) -> tuple[float, Deltas, Deltas]:
    """<after, before> / <before, before>, and both models."""
    model = model_after(strategy, RANKS, 2)
    before = total(model)
    updates = [
        Update(f"client-{k}", 0.5, untrained(strategy, model, f"client-{k}", RANKS[k]))
        for k in (2, 3)
    ]
    after = total(strategy.aggregate(model, Cohort(updates)).model)
    along = sum(float((after[name] * before[name]).sum()) for name in before)
    return along / frobenius(before) ** 2, before, after


@pytest.mark.parametrize("name", MIXED)
def test_a_method_keeps_what_a_round_of_low_ranks_does_not_see_unless_it_says_otherwise(
    name: str,
) -> None:
    strategy = make_strategy(name)
    left, before, after = share_left(strategy)
    if strategy.properties.forgets_unseen:
        assert left < 0.9
    else:
        assert distance(after, before) <= 2e-6 * frobenius(before)


def test_the_documentation_names_those_that_forget_and_how_much_is_left() -> None:
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    section = page.partition("## Who forgets")[2].partition("\n## ")[0]
    lose, keep = section.split("\n* ")[1:3]
    for name in MIXED:
        forgets = make_strategy(name).properties.forgets_unseen
        assert (f"`{name}`" in lose) == forgets
        assert (f"`{name}`" in keep) == (not forgets)
        if forgets:
            assert f"{share_left(make_strategy(name))[0]:.2f} (`{name}`)" in lose
