"""What a person is told who names a strategy wrongly or gives it ranks that do not fit."""

import re
import sys
from pathlib import Path

import pytest

from core.errors import AdapterError, UsageError
from server.method import method_of
from settings.keys import Value
from settings.knobs import RETIRED
from settings.run import RunSettings, run_settings
from strategies.flora import Flora
from strategies.florist import Florist
from strategies.hetlora import HetLora
from strategies.lora_fair import LoraFair
from strategies.registry import (
    STRATEGIES,
    knob_values,
    knobs_in,
    make_strategy,
    promises,
    refuse_ranks,
    strategy_names,
)
from strategies.strategy import Cohort, Update
from strategies.warm_start import POLICIES
from tests.adapter_generators import make_adapter

EQUAL_RANKS_ONLY = [n for n in STRATEGIES if not make_strategy(n).properties.mixed_ranks]
ANY_RANKS = [name for name in STRATEGIES if name not in EQUAL_RANKS_ONLY]


@pytest.mark.parametrize("name", ["FLoRA", "fed-avg", "", "flora "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    known = ", ".join(STRATEGIES)
    with pytest.raises(UsageError, match=f"strategy must be one of {known}, or .*; got '{name}'"):
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


def test_each_method_takes_its_knobs() -> None:
    assert make_strategy("flora") == Flora(1.0, "random")
    assert make_strategy("flora", energy=0.75) == Flora(0.75, "random")
    assert make_strategy("florist") == Florist(0.9, "random")
    assert make_strategy("lora-fair", ridge=0.5) == LoraFair(0.5)
    assert make_strategy("hetlora") == HetLora(0.99, 5e-4, 4)
    assert make_strategy("hetlora", prune=0.25, min_rank=7) == HetLora(0.25, 5e-4, 7)
    assert make_strategy("flora-warm") == Flora(1.0, "global")
    assert make_strategy("flora-warm", energy=0.75) == Flora(0.75, "global")
    assert make_strategy("flora-warm", policy="keep-a") == Flora(1.0, "keep-a")
    assert type(getattr(make_strategy("fedprox", mu=1), "mu", None)) is float


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("flora", {"energy": 0.0}, "strategy.flora.energy must be a number, above 0, at most 1"),
        ("flora", {"energy": "all"}, "strategy.flora.energy must be a number"),
        ("hetlora", {"min_rank": 0}, "strategy.hetlora.min-rank must be a whole number, at least"),
        ("flora-warm", {"policy": "warm"}, "strategy.flora-warm.policy must be text, one of rand"),
        ("fedavg", {"energy": 0.5}, "unknown configuration key 'strategy.fedavg.energy'"),
        ("hetlora", {"prun": 0.5}, "the nearest known key is strategy.hetlora.prune"),
    ],
)
def test_a_knob_that_is_none_or_out_of_range_is_refused(
    name: str, knobs: dict[str, Value], words: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        make_strategy(name, **knobs)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_knob_says_what_it_means_and_has_a_default_that_it_admits(name: str) -> None:
    values = knob_values(name)
    for knob, kind, rule in knobs_in(name):
        assert len(rule.doc) > 10
        assert type(values[knob]) is kind
        assert rule.admits(values[knob])


def settings_with(**values: Value) -> RunSettings:
    names = {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}
    return run_settings(names)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_start_policy_is_taken_by_those_that_leave_the_start_open(policy: str) -> None:
    for name in ("flora", "flora-warm", "florist"):
        chosen = method_of(settings_with(strategy__name=name, start__policy=policy))
        assert getattr(chosen, "policy", None) == policy
    with pytest.raises(
        UsageError, match=rf"start\.policy={policy} is for flora, .*, florist; fedavg says"
    ):
        method_of(settings_with(strategy__name="fedavg", start__policy=policy))


@pytest.mark.parametrize(
    "values",
    [
        {"strategy.energy": 0.5},
        {"strategy.flora.energy": 0.5},
        {"strategy.knobs": "energy=0.5"},
        {"strategy.knobs": "flora.energy=0.5, hetlora.prune=0.5"},
        {"strategy.energy": 0.5, "strategy.hetlora.prune": 0.5},
    ],
)
def test_a_knob_is_set_by_a_key_of_its_own_or_in_a_text(values: dict[str, Value]) -> None:
    assert method_of(run_settings({"strategy.name": "flora"}, values)) == Flora(0.5)


def test_a_later_layer_changes_one_knob_and_leaves_the_others() -> None:
    layers = {"strategy.name": "hetlora", "strategy.hetlora.prune": 0.5}, {"strategy.penalty": 1.0}
    assert method_of(run_settings(*layers)) == HetLora(0.5, 1.0, 4)


def test_the_configuration_of_an_older_run_means_what_it_meant() -> None:
    chose_nothing = {"strategy.name": "fedavg", **RETIRED}
    assert method_of(run_settings(chose_nothing)) == make_strategy("fedavg")
    assert run_settings(chose_nothing) == run_settings({"strategy.name": "fedavg"})
    chose = {"strategy.name": "flora", **RETIRED, "strategy.energy": 0.5}
    assert method_of(run_settings(chose)) == Flora(0.5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy.enery": 0.5}, "'strategy.enery'; the nearest known key is strategy.energy"),
        ({"strategy.nam": "flora"}, "'strategy.nam'; the nearest known key is strategy.name"),
        ({"strategy.ridge": 0.5}, "flora has energy, policy."),
        ({"strategy.hetlra.prune": 0.5}, "got 'hetlra'; the nearest is hetlora"),
        ({"strategy.hetlora.ridge": 0.5}, "strategy.hetlora.ridge is a knob of none of hetlora"),
    ],
)
def test_a_knob_that_the_method_has_not_is_named(values: dict[str, Value], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        method_of(run_settings({"strategy.name": "flora"}, values))


MINE = """
from dataclasses import dataclass
from settings.keys import key
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean

@dataclass(frozen=True)
class Mine(Strategy):
    shrink: float = key("How much of the mean is taken.", default=1.0, above=0, at_most=1)

    @property
    def properties(self):
        return Properties(
            title="Mine", source="here", mixed_ranks=False, exact=False, reveals="the mean",
            sums_only=True, bytes_up="b r D", bytes_down="b r D",
        )

    def begin(self, fresh):
        return GlobalModel(start=fresh)

    def aggregate(self, model, cohort):
        return Aggregated(GlobalModel(start=mean(cohort.updates)))

class Half: pass

@dataclass(frozen=True)
class Plain(Mine):
    knob: float = 1.0
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside the repository, in the folder in which somebody works."""
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods" / "__init__.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    return tmp_path


def test_a_method_of_ones_own_is_named_by_module_and_name(package: Path) -> None:
    name = "my_methods:Mine"
    assert make_strategy(name, shrink=0.5).properties.title == "Mine"
    chosen = method_of(run_settings({"strategy.name": name, f"strategy.{name}.shrink": 0.25}))
    assert chosen == make_strategy(name, shrink=0.25)
    with pytest.raises(UsageError, match=r"strategy\.my_methods:Mine\.shrink must be a number"):
        make_strategy(name, shrink=7.0)


def test_a_method_of_ones_own_is_named_by_its_entry_point(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = package / "site" / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = "mine = my_methods:Mine\ngone = no_such:Thing\nabsent = my_methods:Nobody\n"
    (about / "entry_points.txt").write_text(f"[bouquet.strategies]\n{points}")
    monkeypatch.syspath_prepend(str(package / "site"))
    monkeypatch.syspath_prepend(str(package))
    assert "mine" in strategy_names()
    assert {"gone", "absent"} & set(strategy_names()) == set()  # and nobody else's run is broken
    with pytest.raises(UsageError, match="'gone' cannot be imported: No module named 'no_such'"):
        make_strategy("gone")
    with pytest.raises(UsageError, match="'absent' is not there"):
        make_strategy("absent")
    assert make_strategy("mine", shrink=0.5).properties.title == "Mine"
    assert promises("mine") == make_strategy("mine").properties


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_methods:Yours", "is not there: module 'my_methods' has no attribute 'Yours'"),
        ("my_methods:Plain", "made by settings.keys.key with a .*; not so knob$"),
        ("no_methods:Mine", "cannot be imported: No module named 'no_methods'"),
        ("my_methods:Half", "must be a frozen dataclass .* without properties, begin, aggregate"),
    ],
)
def test_what_is_no_method_is_said(package: Path, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_strategy(name)
    assert promises(name) is None


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
