"""What a person is told who names a strategy wrongly or gives it ranks that do not fit."""

import re

import pytest

from core.errors import AdapterError, UsageError
from strategies.flora import Flora
from strategies.florist import Florist
from strategies.hetlora import HetLora
from strategies.lora_fair import LoraFair
from strategies.registry import (
    AUTO,
    HAVE_A_START_POLICY,
    STRATEGIES,
    Options,
    make_strategy,
    refuse_ranks,
)
from strategies.strategy import Cohort, Update
from strategies.warm_start import POLICIES
from tests.adapter_generators import make_adapter

EQUAL_RANKS_ONLY = [n for n in STRATEGIES if not make_strategy(n).properties.mixed_ranks]
ANY_RANKS = [name for name in STRATEGIES if name not in EQUAL_RANKS_ONLY]


@pytest.mark.parametrize("name", ["FLoRA", "fed-avg", "", "flora "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    known = ", ".join(STRATEGIES)
    with pytest.raises(UsageError, match=f"strategy must be one of {known}; got '{name}'"):
        make_strategy(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("FLoRA", None), ("flexlor", "flexlora"), ("fed-avg", "fedavg"), ("ffa_lora", "ffa-lora")],
)
def test_the_nearest_name_is_offered_where_one_is_near(name: str, nearest: str | None) -> None:
    with pytest.raises(UsageError) as raised:
        make_strategy(name)
    ending = f"; the nearest is {nearest}" if nearest else f"; got {name!r}"
    assert str(raised.value).endswith(ending)


def test_every_method_says_what_it_is() -> None:
    for name in STRATEGIES:
        properties = make_strategy(name).properties
        assert re.search(r"arXiv \d{4}\.\d{5}|[A-Z]{4,} 20\d\d", properties.source), name
        assert all(
            (properties.title, properties.reveals, properties.bytes_up, properties.bytes_down)
        )


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_without_options_each_method_takes_its_own(name: str) -> None:
    assert make_strategy(name) == make_strategy(name, None) == make_strategy(name, Options())
    assert make_strategy(name, Options(energy=0.0, policy=AUTO)) == make_strategy(name)


def test_each_method_takes_the_options_that_concern_it() -> None:
    chosen = Options(energy=0.75, ridge=0.5, prune=0.25, penalty=0.125, min_rank=7)
    assert make_strategy("flora") == Flora(1.0, "random")
    assert make_strategy("flora", chosen) == Flora(0.75, "random")
    assert make_strategy("florist") == Florist(0.9, "random")
    assert make_strategy("florist", chosen) == Florist(0.75, "random")
    assert make_strategy("lora-fair") == LoraFair(0.01)
    assert make_strategy("lora-fair", chosen) == LoraFair(0.5)
    assert make_strategy("hetlora") == HetLora(0.99, 5e-4, 4)
    assert make_strategy("hetlora", chosen) == HetLora(0.25, 0.125, 7)
    assert make_strategy("flora-warm") == Flora(1.0, "global")
    assert make_strategy("flora-warm", chosen) == Flora(0.75, "global")
    others = set(STRATEGIES) - {"flora", "flora-warm", "florist", "lora-fair", "hetlora"}
    assert all(make_strategy(name, chosen) == make_strategy(name) for name in others)


@pytest.mark.parametrize("name", HAVE_A_START_POLICY)
def test_a_start_policy_is_taken_and_an_unknown_one_refused(name: str) -> None:
    for policy in POLICIES:
        assert getattr(make_strategy(name, Options(policy=policy)), "policy", None) == policy
    titles = {make_strategy(name, Options(policy=policy)).properties.title for policy in POLICIES}
    assert len(titles) == len(POLICIES)
    with pytest.raises(UsageError, match=r"start\.policy must be one of random, .*; got 'warm'"):
        make_strategy(name, Options(policy="warm"))


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - set(HAVE_A_START_POLICY)))
def test_a_start_policy_is_refused_where_the_method_says_what_a_round_begins_from(
    name: str,
) -> None:
    for policy in POLICIES:
        with pytest.raises(
            UsageError, match=rf"start\.policy={policy} is for flora, .*, florist; {name} says"
        ):
            make_strategy(name, Options(policy=policy))


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
    strategy = make_strategy(name)
    with pytest.raises(AdapterError, match=r"q_proj comes with ranks \[1, 3\]"):
        strategy.aggregate(strategy.begin(make_adapter(0, shapes, 3)), Cohort(updates))
