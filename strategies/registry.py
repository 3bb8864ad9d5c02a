"""The methods by name, and the one place where a name becomes a Strategy."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from core.errors import UsageError, listing, nearest
from settings.keys import Rule, Value, flatten, parse, walk
from settings.knobs import read_knobs
from strategies.fedadam import FedAdam
from strategies.fedavg import FedAvg
from strategies.fedavgm import FedAvgM
from strategies.fedex_lora import FedExLora
from strategies.fedprox import FedProx
from strategies.fedrot_lora import FedRotLora
from strategies.fedsa_lora import FedSaLora
from strategies.fedsvd import FedSvd
from strategies.fedyogi import FedYogi
from strategies.ffa_lora import FfaLora
from strategies.flexlora import FlexLora
from strategies.flora import Flora
from strategies.flora_na import FloraNa
from strategies.florist import Florist
from strategies.frlora import FrLora
from strategies.hetlora import HetLora
from strategies.ideal import Ideal
from strategies.lora_fair import LoraFair
from strategies.raflora import RaFlora
from strategies.rbla import Rbla
from strategies.rolora import RoLora
from strategies.scaffold import Scaffold
from strategies.strategy import Properties, Strategy
from strategies.zero_padding import ZeroPadding

ROBUST = "geometric-median"


STRATEGIES: Mapping[str, Callable[..., Strategy]] = {
    "flora": Flora,
    "flora-warm": partial(Flora, policy="global"),
    "fedavg": FedAvg,
    "zero-padding": ZeroPadding,
    "hetlora": HetLora,
    "flexlora": FlexLora,
    "ffa-lora": FfaLora,
    "rolora": RoLora,
    "fedex-lora": FedExLora,
    "lora-fair": LoraFair,
    "fedsa-lora": FedSaLora,
    "florist": Florist,
    "frlora": FrLora,
    "rbla": Rbla,
    "flora-na": FloraNa,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "raflora": RaFlora,
    "fedsvd": FedSvd,
    "fedrot-lora": FedRotLora,
    "ideal": Ideal,
}
ENTRY_POINTS = "bouquet.strategies"
"""The group under which a package offers methods of its own by name."""


def make_strategy(name: str, **knobs: Value) -> Strategy:
    """The strategy of this name: one of ours, an entry point's, or `package.module:Name`.

    knobs: the method's own, in place of its defaults.
    Raises UsageError where there is none, or a knob is none of its or not what it must be.

    >>> make_strategy("fedavg").properties.mixed_ranks
    False
    >>> make_strategy("lora-fair", ridge=0.5)
    LoraFair(ridge=0.5)
    """
    made = _found(name)
    prefix = f"strategy.{name}."
    values = {**knob_values(name), **{_kebab(knob): value for knob, value in knobs.items()}}
    keys = {prefix + knob: value for knob, value in values.items()}
    method: Strategy = parse(_method(made), keys, prefix)
    return method


def knobs_in(name: str) -> list[tuple[str, type, Rule]]:
    """(knob, type, what it must be) of each knob of this method."""
    return list(walk(_method(_found(name))))


def knob_values(name: str) -> dict[str, Value]:
    """Knob -> the value that this method gives it by itself."""
    return flatten(_found(name)())


def promises(name: str) -> Properties | None:
    """What a method promises; None where this machine has no method of this name."""
    try:
        return make_strategy(name).properties
    except UsageError:
        return None


def strategy_names() -> list[str]:
    """The names that there are: ours, then those of entry points.

    A package whose method cannot be loaded breaks nobody else's run: it is left out here, and says
    why where it is named.
    """
    others = sorted(set(_entry_points()) - set(STRATEGIES))
    return [*STRATEGIES, *(name for name in others if _loads(name))]


def _found(name: str) -> Callable[..., Strategy]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name in _entry_points():
        return _checked(name, _loaded(name, _entry_points()[name].load))
    if ":" in name:
        return _checked(name, _loaded(name, lambda: _imported(name)))
    near = nearest(name, strategy_names())
    hint = f"; the nearest is {near[0]}" if near else ""
    raise UsageError(
        f"strategy must be one of {', '.join(strategy_names())}, or package.module:Name; "
        f"got {name!r}{hint}"
    )


def _imported(name: str) -> Any:
    """What stands at `package.module:Name`, in an installed package or the folder one works in."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: nothing there hides what is installed
    return getattr(importlib.import_module(module), attribute)


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """What `load` finds; UsageError where it cannot be imported or is not there."""
    try:
        return load()
    except ImportError as error:
        raise UsageError(f"strategy {name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UsageError(f"strategy {name!r} is not there: {error}") from error


def _loads(name: str) -> bool:
    try:
        _found(name)
    except UsageError:
        return False
    return True


def _checked(name: str, made: Any) -> Callable[..., Strategy]:
    """The class of a method that is not ours; UsageError where it is not made like one."""
    method = made.func if isinstance(made, partial) else made
    lacking = [part for part in ("properties", "begin", "aggregate") if not hasattr(method, part)]
    if not is_dataclass(method) or lacking:
        raise UsageError(
            f"strategy {name!r} must be a frozen dataclass with the methods of "
            f"strategies.strategy.Strategy; it is {type(method).__name__}"
            + (f" without {', '.join(lacking)}" if lacking else "")
        )
    plain = [
        entry.name
        for entry in fields(method)
        if "rule" not in entry.metadata or entry.default is MISSING
    ]
    if plain:
        raise UsageError(
            f"each field of strategy {name!r} is a knob, made by settings.keys.key with a sentence "
            f"and a default; not so {listing(plain)}"
        )
    found: Callable[..., Strategy] = made
    return found


def _method(made: Any) -> type[Any]:
    """The class behind a name, whose fields are its knobs."""
    found: Any = made.func if isinstance(made, partial) else made
    return found  # type: ignore[no-any-return]


def _entry_points() -> dict[str, EntryPoint]:
    return {found.name: found for found in entry_points(group=ENTRY_POINTS)}


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def refuse_idle_knobs(text: str, names: Sequence[str] | None = None) -> None:
    """UsageError for a knob of one method that it has not, and for one that none of these has.

    text: strategy.knobs.  names: the methods that run; None: what none of them names is let pass.
    """
    for key in read_knobs(text):
        method, _, knob = key.rpartition(".")
        asked = [method] if method else names
        if asked and not any(knob == each for name in asked for each, _, _ in knobs_in(name)):
            raise UsageError(
                f"strategy.{key} is a knob of none of {', '.join(asked)}: "
                "`bouquet options strategy` lists what each has"
            )


def refuse_weights(name: str, strategy: Strategy, weights: str) -> None:
    """UsageError, before any training, where the strategy would undo robust weights.

    weights: clients.weights.
    """
    undone = strategy.properties.weighs_anew
    if weights != ROBUST or not undone:
        return
    others = [
        other for other in strategy_names() if not make_strategy(other).properties.weighs_anew
    ]
    raise UsageError(
        f"clients.weights={ROBUST} protects nothing under {name}: {undone}. Take "
        "clients.weights=examples or uniform (clients.clip-norm-ratio bounds single clients), or "
        f"another strategy: {', '.join(others)}"
    )


def why_one_rank(name: str, strategy: Strategy) -> str:
    """Why all clients of this strategy need the same rank; empty where they do not."""
    if strategy.properties.mixed_ranks:
        return ""
    others = [other for other in strategy_names() if make_strategy(other).properties.mixed_ranks]
    return (
        f"{name} averages the factors entry by entry and needs one rank for all clients "
        f"(strategies for mixed ranks: {', '.join(others)})"
    )


def refuse_ranks(name: str, strategy: Strategy, ranks: Mapping[str, int]) -> None:
    """UsageError, before any training, where these clients' ranks do not fit the strategy.

    ranks: client -> the rank it trains.
    """
    if strategy.properties.mixed_ranks or len(set(ranks.values())) <= 1:
        return
    by_rank: dict[int, list[str]] = {}
    for client, rank in ranks.items():
        by_rank.setdefault(rank, []).append(client)
    groups = [f"rank {rank}: {listing(by_rank[rank])}" for rank in sorted(by_rank, reverse=True)]
    others = [other for other in strategy_names() if make_strategy(other).properties.mixed_ranks]
    raise UsageError(
        f"{name} averages the factors entry by entry and needs one rank for all clients, but they "
        f"train {len(by_rank)} different ranks ({'; '.join(groups)}). Give every client the same "
        f"rank (--ranks {min(by_rank)}), or take a strategy for mixed ranks: {', '.join(others)}."
    )
