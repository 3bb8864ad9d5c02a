"""A stranger's record, read strictly: whatever it holds, the worst that comes of it is ReplyError.

A record is read by key, each key as what it must be and within its bounds; nothing is converted,
cut to fit or taken for something like it (True is no number, 1.0 no whole one). An error says what
was expected and what came, cut and escaped.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from core.errors import ReplyError, quoted

MOST_KEYS = 64
"""Of one record; ours have fewer than twenty."""
LONGEST_SHOWN = 60
LONGEST_KEY = 80

Fields: TypeAlias = Mapping[str, object]
"""A record as it came: nothing of it is believed yet."""


def config(content: RecordDict, name: str) -> Fields:
    """The ConfigRecord of this name."""
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise ReplyError(f"expected a ConfigRecord {name!r}; got {_kind(record)}")
    return _few(record, name)


def metrics(content: RecordDict) -> Fields:
    """The MetricRecord `metrics`."""
    record = content.get("metrics")
    if not isinstance(record, MetricRecord):
        raise ReplyError(f"expected a MetricRecord 'metrics'; got {_kind(record)}")
    return _few(record, "metrics")


def text(fields: Fields, key: str, longest: int, pattern: str | None = None) -> str:
    """A printable text of at most so many characters, all of which the pattern must match."""
    value = _required(fields, key)
    if not _is_text(value, longest, pattern):
        raise ReplyError(f"{key} must be {_a_text(longest, pattern)}; got {shown(value)}")
    return value  # type: ignore[return-value]


def whole(fields: Fields, key: str, low: int, high: int) -> int:
    """A whole number from low to high."""
    value = _required(fields, key)
    if not _is_whole(value, low, high):
        raise ReplyError(
            f"{key} must be a whole number from {low:,} to {high:,}; got {shown(value)}"
        )
    return value  # type: ignore[return-value]


def number(fields: Fields, key: str, low: float, high: float, is_whole: bool = False) -> float:
    """A number from low to high; a whole one may have come as a float, which MetricRecords have."""
    value = _required(fields, key)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (is_whole and value % 1):  # type: ignore[operator]
        bounds = f"from {low:,.0f} to {high:,.0f}" if is_whole else f"from {low:g} to {high:g}"
        kind = "whole" if is_whole else "finite"
        raise ReplyError(f"{key} must be a {kind} number {bounds}; got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def texts(
    fields: Fields, key: str, most: int, longest: int, pattern: str | None = None
) -> list[str]:
    """A list of at most so many texts, each as `text` takes it."""
    values = _list(fields, key, most)
    for value in values:
        if not _is_text(value, longest, pattern):
            raise ReplyError(
                f"each of {key} must be {_a_text(longest, pattern)}; got {shown(value)}"
            )
    return values  # type: ignore[return-value]


def wholes(fields: Fields, key: str, most: int, low: int, high: int) -> list[int]:
    """A list of at most so many whole numbers from low to high."""
    values = _list(fields, key, most)
    for value in values:
        if not _is_whole(value, low, high):
            raise ReplyError(
                f"each of {key} must be a whole number from {low:,} to {high:,}; got {shown(value)}"
            )
    return values  # type: ignore[return-value]


def shown(value: object) -> str:
    r"""What came, for an error: a few characters of it, escaped, and no copy of the rest.

    >>> print(shown("oslo\x1b[2J"), shown([1.5] * 300_000), shown(True), shown(None))
    'oslo\x1b[2J' a list of 300,000 True nothing
    """
    if value is None:
        return "nothing"
    if isinstance(value, str):
        cut = quoted(value, LONGEST_SHOWN)
        return f"'{cut}'" + (
            "" if len(value) <= LONGEST_SHOWN else f" of {len(value):,} characters"
        )
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return _kind(value)


def _kind(record: object) -> str:
    return "nothing" if record is None else type(record).__name__


def _few(record: Fields, name: str) -> Fields:
    if len(record) > MOST_KEYS:
        raise ReplyError(
            f"the record {name!r} may have {MOST_KEYS} keys at most; it has {len(record):,}"
        )
    for key in record:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", key) or len(key) > LONGEST_KEY:
            raise ReplyError(
                f"the keys of {name!r} are at most {LONGEST_KEY} of a-z, 0-9, '.', '_' and '-'; "
                f"got {shown(key)}"
            )
    return record


def _required(fields: Fields, key: str) -> object:
    if key not in fields:
        raise ReplyError(f"{key} is missing")
    return fields[key]


def _list(fields: Fields, key: str, most: int) -> list[object]:
    value = _required(fields, key)
    if not isinstance(value, list) or len(value) > most:
        raise ReplyError(f"{key} must be a list of at most {most:,}; got {shown(value)}")
    return value


def _is_text(value: object, longest: int, pattern: str | None) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= longest
        and value.isprintable()
        and (pattern is None or re.fullmatch(pattern, value) is not None)
    )


def _a_text(longest: int, pattern: str | None) -> str:
    like = f" like {pattern}" if pattern else ""
    return f"a printable text of at most {longest:,} characters{like}"


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # True is an int, too
