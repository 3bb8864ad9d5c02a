"""The knobs of aggregation methods: values that a method alone knows, carried as one text.

    strategy.hetlora.prune = 0.9      of one method, whichever runs
    strategy.energy = 0.99            of the method that runs
    strategy.knobs = "energy=0.99,hetlora.prune=0.9"      the same two as text: `flwr run` knows
                                      only keys that pyproject.toml names

What a knob means and may be is said by the method's own fields (strategies/registry.py).
"""

from collections.abc import Mapping

from core.errors import UsageError
from settings.keys import Value, as_assignment, as_list, listed, read_assignment

SECTION = "strategy."
KNOBS = "strategy.knobs"
OWN = ("strategy.name", KNOBS)
"""The keys of the section that are no knobs."""
RETIRED = {
    "strategy.energy": 0.0,
    "strategy.ridge": 0.01,
    "strategy.prune": 0.99,
    "strategy.penalty": 0.0005,
    "strategy.min-rank": 4,
}
"""Keys that every run's configuration once had; with these values they chose nothing."""


def fold_knobs(values: Mapping[str, Value]) -> dict[str, Value]:
    """The values with every knob in strategy.knobs.

    >>> fold_knobs({"strategy.knobs": "ridge=1.0", "strategy.flora.energy": 0.9, "rounds": 2})
    {'strategy.knobs': 'ridge=1.0,flora.energy=0.9', 'rounds': 2}
    >>> fold_knobs({"strategy.energy": 0.0})
    {}
    """
    is_knob = {n: n.startswith(SECTION) and n not in OWN for n in values}
    knobs = {
        name.removeprefix(SECTION): value
        for name, value in values.items()
        if is_knob[name] and RETIRED.get(name) != value
    }
    folded = {name: value for name, value in values.items() if not is_knob[name]}
    if knobs:
        folded[KNOBS] = write_knobs({**read_knobs(str(values.get(KNOBS, ""))), **knobs})
    return folded


def read_knobs(text: str) -> dict[str, Value]:
    """Knob -> value; a knob of one method has its name before it.

    >>> read_knobs("energy=0.99, hetlora.min-rank=2")
    {'energy': 0.99, 'hetlora.min-rank': 2}
    """
    found = {}
    for pair in listed(text):
        if "=" not in pair:
            raise UsageError(
                f"strategy.knobs expects KNOB=VALUE with commas, such as ridge=0.5; got {pair!r}"
            )
        name, value = read_assignment(pair)
        found[name.strip()] = value
    return found


def write_knobs(knobs: Mapping[str, Value]) -> str:
    """The text that `read_knobs` reads back."""
    return as_list([as_assignment(name, value) for name, value in knobs.items()])


def knobs_of(text: str, strategy: str) -> dict[str, Value]:
    """Of these knobs, those of the named method and those of whichever runs, without its name.

    >>> knobs_of("energy=0.9,hetlora.prune=0.5", "hetlora")
    {'energy': 0.9, 'prune': 0.5}
    """
    found = {}
    for name, value in read_knobs(text).items():
        method, _, knob = name.rpartition(".")
        if method in ("", strategy):
            found[knob] = value
    return found
