"""The examples of a run: the embedded docstrings, or a person's own files."""

import hashlib
import heapq
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from core.errors import UsageError, listing
from settings.labels import canonical_label
from settings.run import EMBEDDED, DataSettings
from settings.templates import optional_fields, template_fields
from tasks.conversations import COLUMNS, Turn, find_conversation, read_turns
from tasks.files import Cell, Table, data_files, open_table
from tasks.reasons import EMPTY, NULL, NULL_PROMPT, Counts
from tasks.standard_library import read_docstrings

CLASSIFICATION = "classification"
BESIDE_TURNS = ("system", "tools", "functions")
"""Columns that some files have beside their conversations, and that no turn holds."""
DIGITS = 32
"""Of a fingerprint, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: after `prompt` comes `response`; or the text `prompt` has this label.

    A conversation has `turns` instead, and neither prompt nor response.
    """

    prompt: str
    response: str
    group: str
    """Value of the field that partitions go by; the file it came from under `files`."""
    turns: tuple[Turn, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    """The other fields that data.template names, each with its text."""
    file: str = field(default="", compare=False, repr=False)
    """Where it came from, for messages."""

    @property
    def content(self) -> "Content":
        """What is learned; examples with the same are copies of each other."""
        return self.prompt, self.response, self.turns, self.fields


States = tuple[tuple[str, int, int], ...]
"""Of each file its path, its bytes and the time of its last change, in nanoseconds."""
Content = tuple[str, str, tuple[Turn, ...], tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Source:
    """What was read of one file."""

    path: str
    rows: int
    fingerprint: str
    """Hash of the columns that were read, in their order, wherever the file lies."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The examples of some files, and what was met on the way."""

    examples: list[Example]
    sources: tuple[Source, ...]
    counts: Counts
    """Rows that were left out, by reason: null, empty."""
    found: tuple[str, ...]
    """In which fields the examples were found, where no key names them."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Label -> how many rows have it, under classification."""
    first: Mapping[str, str] = field(default_factory=dict)
    """Label -> where it comes first."""
    states: "States" = ()
    """The files as they were."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what."""

    prompt: str = ""
    response: str = ""
    label: str = ""
    turns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Fields of the template that may be empty, and that the file does not have."""
    group: str = ""
    found: str = ""
    """How these are to be called in the run's header; empty where the keys name them."""

    @property
    def wanted(self) -> list[str]:
        """Every column to be read, each once."""
        named = [self.prompt, self.response, self.label, *self.turns, *self.fields, self.group]
        return [name for name in dict.fromkeys(named) if name]


class Examples(list[Example]):
    """Examples that belong together, such as one client's: what is made of them goes with them.

    A plain list cannot be referred to weakly.
    """


def read_examples(
    data: DataSettings, path: str | None = None, task: str = "causal"
) -> list[Example]:
    """All examples at `path` (default: data.path), in a fixed order; raises as `read_data` does."""
    return read_data(data, path, task).examples


def read_data(
    data: DataSettings,
    path: str | None = None,
    task: str = "causal",
    limit: int = 0,
    seed: int = 0,
    key: str = "data.path",
) -> Reading:
    """The examples at `path` (default: data.path), in a fixed order, or `limit` of them by seed.

    Rows without anything to learn (null, empty) are counted and left out. Files are streamed: with
    a limit, memory holds that many examples. The same question twice reads once, as long as no
    file has changed.

    key: what names the files, for messages.

    Raises UsageError where a file is missing or of no known kind, a mapped field is not there or
    holds what cannot be trained on, or nothing of a file is left; under classification also where a
    row has no label, or none of data.labels.
    """
    source = data.path if path is None else path
    if source == EMBEDDED and task == CLASSIFICATION:
        raise UsageError(
            f"{key}=embedded reads docstrings, which have no labels: under task=classification "
            "name files of your own with data.path, their fields with data.text and data.label"
        )
    if source == EMBEDDED:
        drawing = _Drawing(limit, seed)
        for example in _embedded():
            drawing.offer(example)
        return Reading(drawing.examples(), (_embedded_source(),), {}, ())
    states = file_states(source, key)
    reading = _read_files(states, replace(data, labels=""), task, limit, seed if limit else 0)
    known = data.listed_labels() if task == CLASSIFICATION else ()
    odd = [label for label in reading.labels if known and label not in known]
    if odd:
        raise UsageError(
            f"{reading.first[odd[0]]} has the label {odd[0]!r}, which is not among data.labels "
            f"({listing(known)}): add it there, or leave the row out"
        )
    return reading


def fingerprint_of(sources: Iterable[Source]) -> str:
    """One hash for all that was read."""
    each = "\n".join(source.fingerprint for source in sources)
    return hashlib.sha256(each.encode()).hexdigest()[:DIGITS]


@lru_cache(maxsize=1)
def _embedded() -> tuple[Example, ...]:
    """The standard library's docstrings, exact repetitions left out."""
    unique = {(doc.code, doc.text): doc for doc in reversed(read_docstrings())}
    return tuple(
        Example(d.code, d.text, d.package, file=EMBEDDED) for d in reversed(unique.values())
    )


@lru_cache(maxsize=1)
def _embedded_source() -> Source:
    digest, examples = hashlib.sha256(), _embedded()
    for example in examples:
        digest.update(_as_bytes([example.prompt, example.response, example.group]))
    name = f"the standard library of Python {platform.python_version()}"
    return Source(name, len(examples), digest.hexdigest())


def file_states(source: str, key: str = "data.path") -> States:
    """The files at `source` as they are now; none of the embedded data."""
    if source == EMBEDDED:
        return ()
    found = [(file, file.stat()) for file in data_files(key, source)]
    return tuple((str(file), state.st_size, state.st_mtime_ns) for file, state in found)


@lru_cache(maxsize=2)
def _read_files(states: States, data: DataSettings, task: str, limit: int, seed: int) -> Reading:
    """states: so that a file that has changed is read anew."""
    drawing = _Drawing(limit, seed)
    sources, found = [], []
    counts: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path, *_ in states:
        table = open_table(Path(path))
        columns = find_columns(table, data, task)
        digest, lost, odd = hashlib.sha256(), Counter[str](), Counter[str]()
        rows = 0
        for number, values in table.rows(columns.wanted):
            rows += 1
            where = table.where(number)
            try:
                digest.update(_as_bytes(values.values()))
            except UnicodeEncodeError:
                raise UsageError(_lone_surrogate(values, where)) from None
            example, reason = _example(values, columns, path, where, data.partition == "files")
            if example is None:
                lost[reason] += 1
                continue
            drawing.offer(example)
            odd[reason] += bool(reason)
            if columns.label:
                labels[example.response] += 1
                first.setdefault(example.response, where)
        if sum(lost.values()) == rows:
            raise UsageError(_nothing_in(path, rows, lost, columns))
        if odd[NULL_PROMPT] == rows - sum(lost.values()):
            raise UsageError(
                f"all prompts of {path} are null (field {columns.prompt}): fill them, name another "
                "field with data.prompt, or running text with data.text"
            )
        sources.append(Source(path, rows, digest.hexdigest()))
        found.append(columns.found)
        counts += lost + odd
    named = tuple(dict.fromkeys(words for words in found if words))
    return Reading(drawing.examples(), tuple(sources), counts, named, labels, first, states)


def find_columns(table: Table, data: DataSettings, task: str) -> Columns:
    """Which columns of this file hold what: those that keys name, or else a conversation's.

    Raises UsageError for one that is not there, with the nearest name.
    """
    deals_by_field = data.partition in ("dirichlet", "natural")
    group = data.field if deals_by_field else ""
    if deals_by_field and not group:
        raise UsageError(
            f"data.field names no field: data.partition={data.partition} deals by the values of "
            f"one. Choose among those of {table.file}, {listing(table.columns)} "
            "(--set data.field=NAME), or set data.partition=iid"
        )
    if task == CLASSIFICATION:
        columns = Columns(prompt=data.text or data.prompt, label=data.label, group=group)
        return _checked(columns, table, data, task)
    if data.text:
        return _checked(Columns(response=data.text, group=group), table, data, task)
    named = template_fields(data.template)
    fields = tuple(name for name in named if name != "prompt")
    prompt = data.prompt if "prompt" in named else ""
    there = set(table.columns)
    absent = tuple(name for name in fields if name in optional_fields(data.template) - there)
    fields = tuple(name for name in fields if name not in absent)
    plain = Columns(prompt, data.response, fields=fields, absent=absent, group=group)
    if there.issuperset([prompt, data.response] if prompt else [data.response]):
        turns = find_conversation(table.peek([n for n in (prompt, data.response) if n]), data)
    else:
        candidates = ("messages", "conversations", data.prompt, data.response, "completion")
        turns = find_conversation(
            table.peek([name for name in dict.fromkeys(candidates) if name in there]), data
        )
    odd = [name for name in COLUMNS if name in there and not turns]
    if odd and not there & {data.prompt, data.response, *fields}:
        raise UsageError(
            f"{table.file}: field {odd[0]!r} holds no list of messages in its first rows, such as "
            '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]: mend '
            "it, or map other fields with data.prompt and data.response"
        )
    if turns:
        found = f"conversations in {'field' if len(turns) == 1 else 'fields'} {listing(turns)}"
        if beside := [name for name in BESIDE_TURNS if name in there]:
            found += f"; not used: {listing(beside)}"
        return _checked(Columns(turns=turns, group=group, found=found), table, data, task)
    if data.response == "response" and "response" not in there and {prompt, "completion"} <= there:
        plain = replace(plain, response="completion", found="responses in field completion")
    return _checked(plain, table, data, task)


def _checked(columns: Columns, table: Table, data: DataSettings, task: str) -> Columns:
    if columns.group and columns.group not in table.columns:
        raise UsageError(
            f"data.partition={data.partition} deals by a field, and {table.file} has no field "
            f"{columns.group!r}{table.nearest(columns.group)}; its fields are "
            f"{listing(table.columns)}. Name one with data.field, or take data.partition=iid"
        )
    try:
        table.check(columns.wanted)
    except UsageError as error:
        if odd := [name for name in columns.fields if name not in table.columns]:
            raise UsageError(f"{error}. data.template names {{{odd[0]}}}") from None
        mapping = {
            "causal": "data.prompt and data.response, or data.text for running text",
            CLASSIFICATION: "data.text and data.label",
        }[task]
        raise UsageError(f"{error}. Map them with {mapping}.") from None
    return columns


def _example(
    values: Mapping[str, Cell], columns: Columns, file: str, where: str, by_file: bool
) -> tuple[Example | None, str]:
    """The example of a row and what is odd about it; or None, and why there is nothing to learn."""
    group = file if by_file else ""
    if columns.group:
        group = canonical_label(_plain(values, columns.group, where) or "")
    if columns.turns:
        if any(values[name] is None for name in columns.turns):
            return None, NULL
        turns = read_turns(values, columns.turns, where)
        return (Example("", "", group, turns, file=file), "") if turns else (None, EMPTY)
    prompt = _plain(values, columns.prompt, where) if columns.prompt else ""
    if columns.label:
        if prompt is None or not prompt.strip():
            return None, NULL if prompt is None else EMPTY
        return Example(prompt, _label(values, columns, where), group, file=file), ""
    response = _plain(values, columns.response, where)
    if not response:
        return None, NULL if response is None else EMPTY
    fields = [(name, _plain(values, name, where) or "") for name in columns.fields]
    fields += [(name, "") for name in columns.absent]
    reason = NULL_PROMPT if prompt is None else ""
    return Example(prompt or "", response, group, (), tuple(fields), file), reason


def _label(values: Mapping[str, Cell], columns: Columns, where: str) -> str:
    label = canonical_label(_plain(values, columns.label, where) or "")
    if not label:
        raise UsageError(
            f"{where} has no label in field {columns.label!r}: label it, or leave it out"
        )
    return label


def _plain(values: Mapping[str, Cell], name: str, where: str) -> str | None:
    """The text of a scalar; nothing ever trains on what Python prints of a list."""
    value = values[name]
    if value is None or isinstance(value, str):
        return value
    kind = "a list" if isinstance(value, list) else "an object"
    raise UsageError(
        f"{where}: field {name!r} holds {kind}, where text, a number or a boolean is expected. "
        "Conversations are read from a field messages or conversations, or from prompt and "
        "completion as lists of messages"
    )


def _nothing_in(path: str, rows: int, lost: Counts, columns: Columns) -> str:
    """Why nothing of a file is left, in its own words."""
    what = "texts" if columns.label else "conversations" if columns.turns else "responses"
    names = listing(columns.turns or [columns.prompt if columns.label else columns.response])
    empty, null = lost.get(EMPTY, 0), lost.get(NULL, 0)
    if not null:
        reason = f"all {rows:,} {what} of {path} are empty"
    elif not empty:
        reason = f"all {rows:,} {what} of {path} are null"
    else:
        reason = f"of {rows:,} {what} of {path}, {empty:,} are empty and {null:,} null"
    return f"{reason} (field {names}): fill them, name another field, or leave the file out"


def _as_bytes(values: Iterable[Cell]) -> bytes:
    """Cells so that no two rows look the same."""
    parts = []
    for value in values:
        if value is None:
            parts.append(b"null;")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            data = text.encode()
            parts.append(b"%s%d:" % (b"text" if isinstance(value, str) else b"json", len(data)))
            parts.append(data)
    return b"".join(parts)


def _lone_surrogate(values: Mapping[str, Cell], where: str) -> str:
    odd = [name for name, value in values.items() if _is_torn(value)]
    return (
        f"{where}: field {listing(odd)!r} holds half of a character (a lone surrogate such as "
        r"\ud83d), which no text may hold: mend the row, or leave it out"
    )


def _is_torn(value: Cell) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


class _Drawing:
    """A stream of examples of which `limit` are drawn by seed (0: all), in their order.

    Each is given a random number from 0 to 1 as it comes, and those with the smallest stay: every
    example has the same chance, and memory holds only what stays.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._random = np.random.default_rng([seed, 1])
        self._all: list[Example] = []
        self._drawn: list[tuple[float, int, Example]] = []
        self._count = 0

    def offer(self, example: Example) -> None:
        """The next of the stream."""
        if not self._limit:
            self._all.append(example)
            return
        entry = (-float(self._random.random()), self._count, example)
        self._count += 1
        if len(self._drawn) < self._limit:
            heapq.heappush(self._drawn, entry)
        elif entry[0] > self._drawn[0][0]:
            heapq.heapreplace(self._drawn, entry)

    def examples(self) -> list[Example]:
        """What stayed."""
        by_place = sorted(self._drawn, key=lambda entry: entry[1])
        return self._all or [example for _, _, example in by_place]


def choose(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` of the examples (0: all), drawn by seed, in their order.

    >>> choose([Example("a", "b", ""), Example("c", "d", "")], limit=1, seed=0)[0].prompt
    'a'
    """
    if limit == 0 or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng([seed, 1]).permutation(len(examples))[:limit]
    return [examples[index] for index in sorted(chosen)]
