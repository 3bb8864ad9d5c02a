"""Keyword arguments as keys of the configuration: `ranks=[8, 4]`, `local={"epochs": 2}`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.job_options import KEYS, job_layer
from core.errors import UsageError
from settings.keys import Value, as_list


def layer_of(keywords: Mapping[str, Any]) -> dict[str, Value]:
    """Flat keys, as `--set` takes them, from keyword arguments.

    A word that the command line has as an option (`ranks`, `model`, `steps`) means what it means
    there; a mapping is a section, and `_` in a name is `-`. Lists become one text, as in TOML.
    Raises UsageError for a value that no key can hold. Whether a key exists is known later.

    >>> layer_of({"ranks": [8, 4], "local": {"learning_rate": 1e-3}, "data.path": "a.jsonl"})
    {'lora.rank': '8,4', 'clients.count': 2, 'local.learning-rate': 0.001, 'data.path': 'a.jsonl'}
    """
    options = {n: v for n, v in keywords.items() if n in KEYS and not isinstance(v, Mapping)}
    rest = {n: v for n, v in keywords.items() if n not in options}
    plain = {name: _value(name, value) for name, value in options.items() if value is not None}
    if "ranks" in plain:
        plain["ranks"] = str(plain["ranks"])
    return {**job_layer(plain), **_flat(rest)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for name, value in values.items():
        key = prefix + name.replace("_", "-")
        flat |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: _value(key, value)}
    return flat


def _value(name: str, value: Any) -> Value:
    if isinstance(value, list | tuple):
        return as_list([_value(name, each) for each in value])
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    expected = "text, a number, true or false, a path, a list of them, or a mapping for a section"
    raise UsageError(f"{name} must be {expected}; got {type(value).__name__} {value!r:.80}")
