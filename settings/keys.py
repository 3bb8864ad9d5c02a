"""From flat kebab-case keys (`local.learning-rate`) to frozen dataclasses, and back.

A section of the configuration is a frozen dataclass whose fields are made by `key`: a sentence
that says what the value means, and the range it must lie in. Parsing knows nothing else.
"""

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from core.errors import UsageError, nearest
from settings.synonyms import known_synonym

Value = bool | int | float | str
Section = TypeVar("Section")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, as data: so that the error and the manual say the same."""

    doc: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    one_of: tuple[str, ...] = ()
    check: Callable[[Any], object] | None = None

    def range(self) -> str:
        """The allowed values in words; empty where any value of the type will do.

        >>> Rule("", at_least=1).range(), Rule("", above=0, at_most=1).range()
        ('at least 1', 'above 0, at most 1')
        """
        if self.one_of:
            return "one of " + ", ".join(self.one_of)
        bounds = [("at least", self.at_least), ("above", self.above), ("at most", self.at_most)]
        return ", ".join(f"{words} {_plain(bound)}" for words, bound in bounds if bound is not None)

    def admits(self, value: Any) -> bool:
        """Whether the value lies in the range."""
        if self.one_of:
            return value in self.one_of
        return not (
            (isinstance(value, float) and not math.isfinite(value))
            or (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
        )


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def key(doc: str, *, default: Any = MISSING, **rule: Any) -> Any:
    """A field of a section: what it means, and its range.

    default: for values made in code; what is parsed must have every key.
    """
    return field(default=default, metadata={"rule": Rule(doc, **rule)})


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, type, Rule]]:
    """Every key below a section class: (full key, type, rule), in the order of the fields."""
    hints = get_type_hints(section)
    for entry in fields(section):
        name = prefix + entry.name.replace("_", "-")
        if is_dataclass(hints[entry.name]):
            yield from walk(hints[entry.name], name + ".")
        else:
            yield name, *_kind_and_rule(hints[entry.name], entry)


def _kind_and_rule(hint: Any, entry: "Field[Any]") -> tuple[type, Rule]:
    """The type of a value and what it must be; a choice is a Literal of its words."""
    rule: Rule = entry.metadata["rule"]
    if get_origin(hint) is Literal:
        return str, replace(rule, one_of=get_args(hint))
    return hint, rule


def parse(section: type[Section], values: Mapping[str, Value], prefix: str = "") -> Section:
    """A section from flat values. Every key must be there, and no other below the prefix.

    Raises UsageError with the key, what was expected, what came and the nearest known key.
    """
    known = [name for name, _, _ in walk(section, prefix)]
    for name in values:
        if name.startswith(prefix) and name not in known:
            raise UsageError(unknown_key(name, known))
    return _build(section, values, prefix)


def unknown_key(name: str, known: Sequence[str]) -> str:
    """The message for a key that does not exist."""
    near = nearest_key(name, known)
    words = "here this is" if "=" in near else "the nearest known key is"
    hint = f"; {words} {near}" if near else ""
    return f"unknown configuration key {name!r}{hint}. `bouquet options` lists all keys."


def nearest_key(name: str, known: Sequence[str]) -> str:
    """The key that was most likely meant, or `key=value` where other programs say it by a key.

    Empty where no known key is near.

    >>> nearest_key("local.lr", ["local.learning-rate", "local.epochs"])
    'local.learning-rate'
    >>> nearest_key("load_in_4bit", ["model.path", "model.quantization"])
    'model.quantization=nf4'
    """
    spelled = name.strip().lower().replace("_", "-")
    last = spelled.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    return (
        (spelled if spelled in known else "")
        or known_synonym(spelled, known)
        or (same_end[0] if len(same_end) == 1 else "")
        or next(iter(nearest(spelled, known, cutoff=0.5)), "")
    )


def _build(section: type[Section], values: Mapping[str, Value], prefix: str) -> Section:
    hints = get_type_hints(section)
    built: dict[str, Any] = {}
    for entry in fields(section):  # type: ignore[arg-type]
        name = prefix + entry.name.replace("_", "-")
        if is_dataclass(hints[entry.name]):
            built[entry.name] = _build(hints[entry.name], values, name + ".")
        elif name not in values:
            rule = _kind_and_rule(hints[entry.name], entry)[1]
            wanted = rule.range() or "a value"
            raise UsageError(f"configuration key {name} is missing; expected {wanted}")
        else:
            built[entry.name] = _checked(
                name, values[name], *_kind_and_rule(hints[entry.name], entry)
            )
    return section(**built)


def _checked(name: str, value: Value, kind: type, rule: Rule) -> Value:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or not rule.admits(value):
        wanted = KINDS[kind] + (f", {rule.range()}" if rule.range() else "")
        raise UsageError(f"{name} must be {wanted}; got {value!r}. It means: {rule.doc}")
    if rule.check is not None:
        try:
            rule.check(value)
        except ValueError as error:
            raise UsageError(f"{name}: {error}; got {value!r}. It means: {rule.doc}") from None
    return value


def shown_value(value: Value) -> str:
    r"""A value on one line, as TOML would have it, but without quotes around text.

    >>> shown_value(True), shown_value(0.006), shown_value("a\nb"), shown_value("")
    ('true', '0.006', 'a\\nb', '""')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace("\n", "\\n") or '""'


def flatten(settings: Any, prefix: str = "") -> dict[str, Value]:
    """The flat values that parse back to these settings."""
    flat: dict[str, Value] = {}
    for entry in fields(settings):
        name, value = prefix + entry.name.replace("_", "-"), getattr(settings, entry.name)
        flat |= flatten(value, name + ".") if is_dataclass(value) else {name: value}
    return flat


def flatten_tables(
    tables: Mapping[str, Any], prefix: str = "", lists: bool = True
) -> dict[str, Value]:
    """Nested TOML tables as flat keys.

    lists: False refuses lists as `flwr run` will, which takes them as text alone.

    >>> flatten_tables({"local": {"epochs": 2}, "rounds": 3})
    {'local.epochs': 2, 'rounds': 3}
    """
    flat: dict[str, Value] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten_tables(value, f"{prefix}{name}.", lists)
        elif isinstance(value, list) and not lists:
            raise UsageError(
                f"{prefix}{name} is a list, which flwr run does not take: write it as text, "
                f"{name} = {_literal(as_list(value))}"
            )
        elif isinstance(value, list):
            flat[prefix + name] = as_list(value)
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = value
        else:
            raise UsageError(f"{prefix}{name} must be a number, text, true or false; got {value!r}")
    return flat


def _literal(text: str) -> str:
    r"""A text as TOML reads it back character by character.

    >>> print(_literal('["yes, but", "no"]'), _literal("[it's]"))
    '["yes, but", "no"]' '''[it's]'''
    """
    quotes = "'''" if "'" in text else "'"
    return f"{quotes}{text}{quotes}"


def as_list(values: Sequence[object]) -> str:
    """Several values as the text of one key, which `listed` reads back: flat keys hold no lists.

    >>> as_list([16, 8, 8]), as_list(["a, b", "c"]), as_list([True, False])
    ('16,8,8', '["a, b", "c"]', 'true,false')
    """
    texts = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    plain = ",".join(texts)
    return plain if listed(plain) == tuple(texts) else json.dumps(texts, ensure_ascii=False)


def listed(text: str) -> tuple[str, ...]:
    """The values in a text with commas, or in a TOML list, whose values may hold commas.

    >>> listed("a, b"), listed('["a, b", "c"]'), listed("")
    (('a', 'b'), ('a, b', 'c'), ())
    """
    if text.lstrip().startswith("["):
        with suppress(tomllib.TOMLDecodeError, RecursionError):
            values = tomllib.loads(f"values = {text}")["values"]
            return tuple(str(value) for value in values)
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def read_assignment(text: str) -> tuple[str, Value]:
    """`key=value` as a person types it: TOML where it is TOML, and text where it is not.

    >>> read_assignment("local.max-steps=4"), read_assignment("strategy.name=flora")
    (('local.max-steps', 4), ('strategy.name', 'flora'))
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set expects key=value, such as local.max-steps=4; got {text!r}")
    try:
        parsed = flatten_tables(tomllib.loads(f"value = {value}"))
    except (tomllib.TOMLDecodeError, UsageError):  # such as a date, which no key takes
        return name.strip(), value
    return name.strip(), parsed.get("value", value)


def as_assignment(name: str, value: Value) -> str:
    """`key=value` on one line, which `read_assignment` reads back.

    >>> as_assignment("data.template", "{prompt}: "), as_assignment("data.labels", "7")
    ('data.template={prompt}: ', 'data.labels="7"')
    """
    plain = f"{name}={str(value).lower() if isinstance(value, bool) else value}"
    if isinstance(value, str) and (not value.isprintable() or read_assignment(plain)[1] != value):
        return f"{name}={json.dumps(value, ensure_ascii=False)}"
    return plain


def coerce(values: Mapping[str, Value], section: Any) -> dict[str, Value]:
    """Numbers typed where text is expected become text (`lora.rank=8`); the rest stays."""
    textual = {name for name, kind, _ in walk(section) if kind is str}
    return {
        name: str(value) if name in textual and type(value) in (int, float) else value
        for name, value in values.items()
    }
