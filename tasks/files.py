"""Data files row by row: .jsonl, .json, .csv and .parquet, each value to the letter of the file.

A scalar is the text of its literal: `1`, `4.5`, `9007199254740993`, `1e2`, `true`. No type is
inferred, so that a date stays the text it was. Only the columns asked for are looked at; what the
others hold is of no concern. Files are streamed: memory holds one row (of .parquet, one batch).
"""

import codecs
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from core.errors import UsageError, listing, nearest
from settings.paths import absolute_path, named_paths

Cell: TypeAlias = "str | list[Cell] | dict[str, Cell] | None"
"""The text of a scalar, None for null, or what is nested, with such texts as its leaves."""
CHUNK = 1 << 20
"""Characters of a .json file read at a time, and the start of what doubles for longer objects."""
FIRST_ROWS = 100
"""Rows that are looked at to find out which columns a file has, and what they hold."""
BATCH = 512
"""Rows of a .parquet file in memory at a time."""
ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class Row(NamedTuple):
    """One row: its number in the file, counted from 1, and the columns asked for."""

    number: int
    values: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """A file that is open to be read, and the columns of its first rows."""

    file: Path
    columns: tuple[str, ...]
    unit: str
    """What is counted: lines, where a person finds a row by its line, else rows."""

    def where(self, number: int) -> str:
        """A row, as a message names it."""
        return f"{self.file}, {self.unit} {number}"

    def check(self, wanted: Sequence[str]) -> None:
        """UsageError for a column that is not there, with the nearest that is."""
        for name in wanted:
            if name not in self.columns:
                raise UsageError(
                    f"{self.file} has no field {name!r}{self.nearest(name)}; its fields are "
                    f"{listing(self.columns)}"
                )

    def nearest(self, name: str) -> str:
        """The column with the name most like this one, in brackets; empty where none is like it."""
        near = nearest(name, self.columns)
        return f" (nearest: {near[0]})" if near else ""

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """All rows from the beginning, with these columns; one that a row lacks is null.

        Raises UsageError, naming file and row, where the file is not what its ending says, and
        for a value that is neither text, number nor boolean, nor nested of such.
        """
        self.check(wanted)
        for number, values in READERS[self.file.suffix.lower()](self.file, wanted):
            cells: dict[str, Cell] = {}
            for name in wanted:
                value = values.get(name)
                if value is not None and type(value) is not str:
                    try:
                        value = self._cell(value, name, number)
                    except RecursionError:
                        raise UsageError(
                            f"{self.where(number)}: field {name!r} is nested too deeply to be read"
                        ) from None
                cells[name] = value
            yield Row(number, cells)

    def peek(self, wanted: Sequence[str]) -> Mapping[str, Cell]:
        """Of each of these columns its first value that is not null, in the first rows."""
        found: dict[str, Cell] = dict.fromkeys(wanted)
        for _, values in islice(self.rows(wanted), FIRST_ROWS):
            found |= {name: values[name] for name in wanted if found[name] is None}
            if None not in found.values():
                break
        return found

    def _cell(self, value: Any, name: str, number: int) -> Cell:
        if value is True or value is False:
            return "true" if value else "false"
        if value is None or type(value) is str:
            return value
        if isinstance(value, list):
            return [self._cell(item, name, number) for item in value]
        if isinstance(value, dict):
            return {str(key): self._cell(item, name, number) for key, item in value.items()}
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        if isinstance(value, int):
            return str(value)
        if isinstance(value, Decimal):
            return f"{value:f}"
        raise UsageError(
            f"{self.where(number)}: field {name!r} holds {_described(value)}, which is neither "
            "text, number, boolean nor a conversation: leave the row out, or name another field"
        )


class _NoJson(str):
    """NaN or Infinity, which Python's parser takes and JSON does not have."""

    __slots__ = ()


def _described(value: object) -> str:
    if isinstance(value, _NoJson | float):
        return str(value)
    return {"bytes": "binary data"}.get(type(value).__name__, f"a {type(value).__name__}")


def data_files(key: str, text: str) -> tuple[Path, ...]:
    """The data files that a key names, in that order; a folder stands for its own, by name.

    A name is a name: nothing in it is a pattern, and the case of its ending does not matter.
    Raises UsageError for a name with nothing behind it, or behind it no data.
    """
    files: list[Path] = []
    for name in named_paths(text):
        path = Path(absolute_path(name))
        if not name:
            raise UsageError(f"{key}={text!r} holds an empty name between two commas")
        if path.is_dir():
            inside = _data_in(path)
            if not inside:
                raise UsageError(f"{key}: no {', '.join(READERS)} file in {path}")
            files += inside
        elif not path.is_file():
            hint = "; names are taken to the letter, * and ? too" if set(name) & set("*?") else ""
            raise UsageError(f"{key} names {name!r}, where there is no file or folder{hint}")
        elif path.suffix.lower() not in READERS:
            raise UsageError(f"data must be {', '.join(READERS)}; got {path}")
        else:
            files.append(path)
    if not files:
        raise UsageError(f"{key} names no file")
    if twice := {str(file) for file in files if files.count(file) > 1}:
        raise UsageError(f"{key} names {min(twice)} twice: its rows would count twice")
    return tuple(files)


def _data_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error


def open_table(file: Path) -> Table:
    """Look at the first rows. UsageError where the file cannot be read or holds none."""
    suffix = file.suffix.lower()
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            begin = opened.read(4)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if size == 0:
        raise UsageError(f"{file} is empty: leave it out, or fill it")
    if suffix == ".parquet":
        columns = _parquet_columns(file)
        return Table(file, columns, "row")
    encoding = ENCODINGS.get(begin[:2]) or ("UTF-16 or UTF-32" if b"\0" in begin else None)
    if encoding:
        raise UsageError(f"{file} is written in {encoding}: save it as UTF-8")
    if suffix == ".csv":
        return Table(file, _csv_columns(file), "line")
    first = list(islice(READERS[suffix](file, ()), FIRST_ROWS))
    if not first:
        raise UsageError(f"{file} holds no row: leave it out, or fill it")
    names = dict.fromkeys(name for _, row in first for name in row)
    return Table(file, tuple(names), "line" if _in_lines(file) else "row")


def _text(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}, line {number}, is not UTF-8 (byte 0x{line[error.start]:02x} at position "
            f"{error.start + 1}): save the file as UTF-8"
        ) from None


def _lines(file: Path) -> Iterator[str]:
    """Each line with its end, without the mark that some editors put before the first."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            yield _text(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, file, number)


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_NoJson)


def _no_json(error: json.JSONDecodeError, text: str, where: str, hint: str = "") -> UsageError:
    before, after = text[: error.pos].rstrip()[-1:], text[error.pos :].lstrip()[:1]
    stray = (before == "," and after in ("}", "]", "")) or (after == "," and before in "}],")
    reason = "a stray comma" if stray else error.msg
    column = error.pos - text.rfind("\n", 0, error.pos)
    return UsageError(f"{where}: no JSON: {reason} (column {column}){hint}")


def _read_json_lines(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(_lines(file), start=1):
        if text.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            row = _DECODER.decode(text)
        except json.JSONDecodeError as error:
            raise _no_json(error, text, where, _expected(file, number)) from None
        except RecursionError:
            raise UsageError(f"{where}: nested too deeply to be read") from None
        if not isinstance(row, dict):
            raise UsageError(
                f'{where}: expected an object such as {{"prompt": ..., "response": ...}} on '
                f"each line, got {_json_kind(row)}{_expected(file, number)}"
            )
        yield number, row


def _expected(file: Path, number: int) -> str:
    if number > 1:
        return ""
    if file.suffix.lower() == ".json":
        return ". A .json file holds an array of objects, [{...}, {...}], or one object a line"
    return ". A .jsonl file holds one object a line; an array of objects belongs into a .json file"


def _json_kind(value: object) -> str:
    if isinstance(value, list):
        return "an array"
    return "null" if value is None else "text, a number or a boolean"


def _in_lines(file: Path) -> bool:
    """Whether a JSON file holds one object a line, or an array of objects."""
    if file.suffix.lower() == ".jsonl":
        return True
    with file.open("rb") as opened:
        begin = opened.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    return begin.lstrip().startswith(b"{")


def _read_json(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of an array, one after the other, of which one at a time is held."""
    if _in_lines(file):
        yield from _read_json_lines(file, wanted)
        return
    text = _Stream(file)
    if text.skip_space() != "[":
        raise UsageError(f"{file}: expected an array of objects, [{{...}}, {{...}}]")
    text.at += 1
    number = 0
    if text.skip_space() == "]":
        return
    while True:
        number += 1
        where = f"{file}, row {number}"
        if text.skip_space() != "{":
            what = "nothing more" if not text.skip_space() else repr(text.ahead(20))
            stray = number > 1 and text.skip_space() in ("]", ",")
            raise UsageError(f"{where}: {'a stray comma' if stray else f'no object: {what}'}")
        yield number, text.object(where)
        following = text.skip_space()
        text.at += 1
        if following == "]":
            break
        if following != ",":
            text.at -= 1
            raise UsageError(
                f"{where}: expected a comma or ] after it, got {text.ahead(20)!r}"
                if following
                else f"{where}: the file ends within its array: it is cut off"
            )
    if text.skip_space():
        raise UsageError(f"{file}: after its array comes {text.ahead(20)!r}")


def _decoded(
    decoder: codecs.IncrementalDecoder, data: bytes, file: Path, end: int, final: bool = False
) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        place = end - len(error.object) + error.start + 1
        raise UsageError(
            f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {place:,}): "
            "save the file as UTF-8"
        ) from None


class _Stream:
    """The text of a file, of which the part from `at` on is in memory."""

    def __init__(self, file: Path) -> None:
        self.at = 0
        self._text = ""
        self._ahead = self._chunks(file)

    @staticmethod
    def _chunks(file: Path) -> Iterator[str]:
        """The file in pieces; a whole array may stand on one line."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with file.open("rb") as opened:
            while data := opened.read(CHUNK):
                yield _decoded(decoder, data, file, opened.tell())
            yield _decoded(decoder, b"", file, opened.tell(), final=True)

    def _read_on(self) -> bool:
        """At least as much again as is in memory; False at the end of the file."""
        more, size = [], 0
        for chunk in self._ahead:
            more.append(chunk)
            size += len(chunk)
            if size >= len(self._text) - self.at:
                break
        self._text, self.at = self._text[self.at :] + "".join(more), 0
        return size > 0

    def skip_space(self) -> str:
        """The next visible character; "" at the end of the file."""
        while True:
            while self.at < len(self._text):
                if not self._text[self.at].isspace():
                    return self._text[self.at]
                self.at += 1
            if not self._read_on():
                return ""

    def ahead(self, count: int) -> str:
        """The next characters."""
        return self._text[self.at : self.at + count]

    def object(self, where: str) -> dict[str, Any]:
        """The object that begins here."""
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos + 20 > len(self._text)
                if not (cut_off and self._read_on()):
                    raise _no_json(error, self._text[: error.pos + 20], where) from None
            except RecursionError:
                raise UsageError(f"{where}: nested too deeply to be read") from None
            else:
                assert isinstance(value, dict)
                return value


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each row that is not blank."""
    csv.field_size_limit(1 << 62)
    reader = csv.reader(_lines(file), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "a quote that is never closed" if "end of data" in str(error) else str(error)
            raise UsageError(f"{file}, line {number}: no CSV: {what}") from None
        if cells:
            yield number, cells


def _csv_columns(file: Path) -> tuple[str, ...]:
    rows = _csv_rows(file)
    _, columns = next(rows, (0, []))
    if next(rows, None) is None:
        raise UsageError(f"{file} holds no row below its header: leave it out, or fill it")
    return tuple(columns)


def _read_csv(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _csv_rows(file)
    _, columns = next(rows)
    for name in wanted:
        if columns.count(name) > 1:
            raise UsageError(f"{file} has {columns.count(name)} columns {name!r}: rename one")
    for number, cells in rows:
        if len(cells) != len(columns):
            raise UsageError(
                f"{file}, line {number}: {len(cells)} cells, but the header names {len(columns)} "
                "columns. A cell that holds commas or line breaks stands in quotes"
            )
        yield number, dict(zip(columns, cells, strict=True))


def _parquet_columns(file: Path) -> tuple[str, ...]:
    with _parquet(file) as opened:
        if opened.metadata.num_rows == 0:
            raise UsageError(f"{file} holds no row: leave it out, or fill it")
        return tuple(opened.schema_arrow.names)


def _parquet(file: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{file} cannot be read as .parquet: {reason}") from None


def _read_parquet(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    number = 0
    with _parquet(file) as opened:
        names = opened.schema_arrow.names
        for name in wanted:
            if names.count(name) > 1:
                raise UsageError(f"{file} has {names.count(name)} columns {name!r}: rename one")
        try:
            for batch in opened.iter_batches(BATCH, columns=list(wanted), use_threads=False):
                try:
                    columns = {name: _arrow_values(batch.column(name)) for name in wanted}
                except UnicodeDecodeError as error:
                    raise UsageError(
                        f"{file}, rows {number + 1} to {number + batch.num_rows}: a text that is "
                        f"not UTF-8 ({error.reason}) in one of the fields {listing(wanted)}"
                    ) from None
                for index in range(batch.num_rows):
                    number += 1
                    yield number, {name: values[index] for name, values in columns.items()}
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"{file}, after row {number}: cannot be read: {reason}") from None


def _arrow_values(column: Any) -> list[Any]:
    """A column by its declared type: dates and times as ISO, a float in its own few digits."""
    from pyarrow import types

    kind = column.type
    if types.is_temporal(kind) and not types.is_duration(kind) and not types.is_interval(kind):
        texts: list[Any] = column.cast("string").to_pylist()
        stamps = types.is_timestamp(kind)
        return [text.replace(" ", "T", 1) if stamps and text else text for text in texts]
    values: list[Any] = column.to_pylist()
    if types.is_float16(kind) or types.is_float32(kind):
        import numpy as np

        narrow = np.float16 if types.is_float16(kind) else np.float32
        return [
            str(narrow(value)) if value is not None and math.isfinite(value) else value
            for value in values
        ]
    return values


READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
