"""A run that begins from an adapter: under every method it is in the global model, and stays."""

from dataclasses import replace

import pytest

from adapters.peft_files import PeftAdapter
from core.errors import UsageError
from server.start_adapter import read_start_adapter, with_adapter
from settings.run import run_settings
from strategies.strategy import Cohort, Strategy
from tests.dense_oracle import add, dense_deltas
from tests.strategies.cohorts import (
    CONFIGURATIONS,
    SHAPES,
    assert_close,
    begun,
    cohorts,
    frozen,
    replies_to,
    total,
    trained,
)

# A share of the energy that is kept is one of all that was merged, the adapter included.
UNCUT = {n: s for n, s in CONFIGURATIONS.items() if getattr(s, "energy", 1.0) == 1.0}


@pytest.mark.parametrize(("strategy", "ranks"), cohorts(UNCUT))
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_every_method_adds_its_rounds_to_it(
    strategy: Strategy, ranks: tuple[int, ...], rank: int
) -> None:
    adapter = trained(50, rank)
    plain = begun(strategy, ranks)
    model = with_adapter(plain, PeftAdapter(adapter))
    assert_close(frozen(model), add(frozen(plain), dense_deltas(adapter)))
    assert model.start is plain.start
    replies = replies_to(strategy, plain, ranks, seed=1)
    after, without = (strategy.aggregate(m, Cohort(replies)).model for m in (model, plain))
    assert_close(total(after), add(total(without), dense_deltas(adapter)), relative=1e-5)


def test_its_head_is_the_first() -> None:
    model = begun(CONFIGURATIONS["flora"], (4,))
    head = {"score.weight": trained(1, 2)["layers.1.q_proj"].a}
    found = PeftAdapter(trained(50, 2), head)
    assert with_adapter(model, found).head is head
    assert with_adapter(model, replace(found, head={})).head is None


def test_without_one_nothing_changes() -> None:
    model = begun(CONFIGURATIONS["flora"], (4,))
    assert read_start_adapter(run_settings(), SHAPES) is None
    assert with_adapter(model, None) is model


def test_a_folder_that_is_none_is_named() -> None:
    settings = run_settings({"start.adapter": "nowhere"})
    with pytest.raises(UsageError, match=r"start.adapter names .*nowhere, which is no folder: exp"):
        read_start_adapter(settings, SHAPES)
