"""Robust weights hold only where the method takes them as they are; others refuse them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from adapters.adapter import Adapter, Factors
from core.errors import UsageError
from server.method import method_of
from settings.run import run_settings
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, Strategy
from tests.dense_oracle import distance, frobenius
from tests.strategies.cohorts import CONFIGURATIONS, begun, cohorts, replies_to, total

GLOBAL = {n: s for n, s in CONFIGURATIONS.items() if not s.properties.personal}
UNDO = [name for name in STRATEGIES if make_strategy(name).properties.weighs_anew]


@pytest.mark.parametrize(("strategy", "ranks"), cohorts(GLOBAL))
def test_a_weight_of_nearly_nothing_means_nearly_nothing_or_is_declared_undone(
    strategy: Strategy, ranks: Sequence[int]
) -> None:
    """The client of the largest rank sends a change 10^4 times too large, at a weight of 1e-7."""
    before = begun(strategy, ranks)
    honest = replies_to(strategy, before, ranks)
    factor = 1e4
    huge = {n: Factors(f.a, factor * f.b, f.scale) for n, f in honest[0].adapter.items()}
    weights = [1e-7, 0.4, 0.35, 0.25]
    updates = [replace(u, weight=w) for u, w in zip(honest, weights, strict=True)]
    expected = total(strategy.aggregate(before, Cohort(updates)).model)
    updates[0] = replace(updates[0], adapter=Adapter(huge))
    moved = distance(
        total(strategy.aggregate(before, Cohort(updates)).model), expected
    ) / frobenius(expected)
    if not strategy.properties.weighs_anew:
        assert moved < (2e-2 if strategy.properties.steps else 1e-2)
    elif len(set(ranks)) > 1:
        assert moved > 1.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_robust_weights_are_refused_where_they_would_be_undone(name: str) -> None:
    layer = {"strategy.name": name, "clients.weights": "geometric-median"}
    if name not in UNDO:
        method_of(run_settings(layer))  # type: ignore[arg-type]
        return
    with pytest.raises(UsageError, match=f"protects nothing under {name}: .*examples or uniform"):
        method_of(run_settings(layer))  # type: ignore[arg-type]
    method_of(run_settings({**layer, "clients.weights": "uniform"}))  # type: ignore[arg-type]


def test_hetlora_is_among_them() -> None:
    assert "hetlora" in UNDO
