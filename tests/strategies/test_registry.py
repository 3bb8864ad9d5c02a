"""What a person is told who names a strategy wrongly or gives it ranks that do not fit."""

import pytest

from adapters.errors import AdapterError, UsageError
from strategies.registry import STRATEGIES, make_strategy, refuse_ranks
from strategies.strategy import GlobalModel, Update
from tests.adapter_generators import make_adapter

EQUAL_RANKS_ONLY = [n for n in STRATEGIES if not make_strategy(n).properties.mixed_ranks]
ANY_RANKS = [name for name in STRATEGIES if name not in EQUAL_RANKS_ONLY]


@pytest.mark.parametrize("name", ["FLoRA", "fed-avg", "", "flora "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    known = ", ".join(STRATEGIES)
    with pytest.raises(UsageError, match=f"strategy must be one of {known}; got '{name}'"):
        make_strategy(name)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_making_a_strategy_twice_gives_equal_values(name: str) -> None:
    assert make_strategy(name) == make_strategy(name)
    assert len({make_strategy(other).properties.title for other in STRATEGIES}) == len(STRATEGIES)


@pytest.mark.parametrize("name", EQUAL_RANKS_ONLY)
def test_refused_ranks_are_named_with_their_clients_and_the_way_out(name: str) -> None:
    ranks = {"hospital": 8, "bank": 64, "school": 8, "library": 16}
    with pytest.raises(UsageError) as raised:
        refuse_ranks(name, make_strategy(name), ranks)
    message = str(raised.value)
    assert message.startswith(f"{name} averages the factors entry by entry")
    assert (
        "3 different ranks (rank 64: bank; rank 16: library; rank 8: hospital, school)" in message
    )
    assert "--ranks 8" in message
    assert message.endswith(f"a strategy for mixed ranks: {', '.join(ANY_RANKS)}.")
    assert name not in message.partition("mixed ranks: ")[2]


@pytest.mark.parametrize("name", EQUAL_RANKS_ONLY)
def test_a_long_list_of_clients_is_cut(name: str) -> None:
    ranks = {f"client-{k}": 4 for k in range(64)} | {"odd": 2}
    with pytest.raises(
        UsageError, match=r"rank 4: client-0, .*client-4 \(showing 5 of 64\); rank 2: odd"
    ):
        refuse_ranks(name, make_strategy(name), ranks)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_one_rank_for_all_suits_every_strategy(name: str) -> None:
    for ranks in ({}, {"a": 4}, {"a": 4, "b": 4}):
        refuse_ranks(name, make_strategy(name), ranks)


@pytest.mark.parametrize("name", ANY_RANKS)
def test_mixed_ranks_suit_a_strategy_that_declares_them(name: str) -> None:
    refuse_ranks(name, make_strategy(name), {"a": 4, "b": 64})


@pytest.mark.parametrize("name", EQUAL_RANKS_ONLY)
def test_mixed_ranks_that_come_all_the_same_are_not_broadcast(name: str) -> None:
    shapes = {"q_proj": (6, 6)}
    updates = [Update(str(r), 0.5, make_adapter(r, shapes, r)) for r in (1, 3)]
    with pytest.raises(AdapterError, match=r"q_proj comes with ranks \[1, 3\]"):
        make_strategy(name).aggregate(GlobalModel(), updates)
