"""Rows come out of every kind of file to the letter, and each fault has a message of its own."""

import codecs
import csv
import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from core.errors import UsageError
from tasks.files import CHUNK, Cell, data_files, open_table
from tests.adapter_generators import QUICK

KINDS = [".jsonl", ".json", ".csv", ".parquet"]


def read(file: Path, *wanted: str) -> list[dict[str, Cell]]:
    return [dict(values) for _, values in open_table(file).rows(wanted)]


def written(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def column(values: list[Any], kind: Any, folder: Path) -> list[Cell]:
    table = pyarrow.table({"a": pyarrow.array(values, kind)})
    parquet.write_table(table, folder / "a.parquet")
    return [row["a"] for row in read(folder / "a.parquet", "a")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL", ".Json"])
def test_a_json_scalar_is_its_literal(suffix: str, tmp_path: Path) -> None:
    literals = ["1", "-0", "4.50", "9007199254740993", "1e2", "1E+400", "true", "false", "9" * 5000]
    rows = [f'{{"b": [NaN], "a": {literal}}}' for literal in [*literals, "null", '"é\\u00e9"']]
    text = "\n\n".join(rows) if suffix.lower() == ".jsonl" else f"[{', '.join(rows)}]"
    found = read(written(tmp_path / f"a{suffix}", text), "a")
    assert [row["a"] for row in found] == [*literals, None, "éé"]


def test_what_is_nested_stays_so_with_literal_leaves(tmp_path: Path) -> None:
    row = '{"a": [{"role": "user", "n": 1.0, "t": true, "x": null, "l": [[1e1]]}]}'
    expected = [{"role": "user", "n": "1.0", "t": "true", "x": None, "l": [["1e1"]]}]
    assert read(written(tmp_path / "a.jsonl", row), "a") == [{"a": expected}]
    messages = [[{"role": "user", "n": 1}], None, []]
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("n", pyarrow.int8())]))
    assert column(messages, kind, tmp_path) == [[{"role": "user", "n": "1"}], None, []]


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, str]]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    row = st.fixed_dictionaries({"a": text, "b, c": text})
    return draw(st.lists(row, min_size=1, max_size=8))


@QUICK
@given(rows=tables(), suffix=st.sampled_from(KINDS))
def test_any_text_comes_back(
    rows: list[dict[str, str]], suffix: str, tmp_path_factory: Any
) -> None:
    file = tmp_path_factory.mktemp("rows") / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", encoding="utf-8", newline="") as opened:
            if suffix == ".csv":
                writer = csv.DictWriter(opened, ["a", "b, c"], quoting=csv.QUOTE_ALL)
                writer.writeheader()
                writer.writerows(rows)
            elif suffix == ".json":
                json.dump(rows, opened, ensure_ascii=False, indent=2)
            else:
                opened.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert read(file, "b, c", "a") == rows


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_longer_than_what_is_read_at_a_time(indent: int | None, tmp_path: Path) -> None:
    sizes = [10, CHUNK // 3, CHUNK // 2, 5 * CHUNK, 3, CHUNK, 1]
    rows = [{"a": 'é"\\,]}' + "東" * size} for size in sizes]
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    assert read(written(tmp_path / "a.json", text), "a") == rows


def test_objects_line_by_line_are_read_from_a_json_file_too(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.json", '\n{"a": 1}\n{"a": 2}\n'), "a") == [
        {"a": "1"},
        {"a": "2"},
    ]


def test_a_cell_of_a_csv_is_text_and_may_be_large(tmp_path: Path) -> None:
    cells = ["None", "NA", "007", "1.50", " x ", "", "a\nb, c", "x" * 400_000]
    with (tmp_path / "a.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([["n", "a"], *([k, cell] for k, cell in enumerate(cells))])
    assert [row["a"] for row in read(tmp_path / "a.csv", "a")] == cells


def test_a_line_is_where_a_person_finds_it(tmp_path: Path) -> None:
    text = 'a,b\n1,"two\nlines"\n\n3,4\n'
    table = open_table(written(tmp_path / "a.csv", text))
    assert [row.number for row in table.rows(["a"])] == [2, 5]
    assert table.where(5) == f"{tmp_path}/a.csv, line 5"
    table = open_table(written(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}'))
    assert [row.number for row in table.rows(["a"])] == [2, 4]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 2**60 + 1], pyarrow.int64(), ["1", None, "1152921504606846977"]),
        ([True, False, None], pyarrow.bool_(), ["true", "false", None]),
        ([0.1, 1.0, None], pyarrow.float32(), ["0.1", "1.0", None]),
        ([0.1, 1e300], pyarrow.float64(), ["0.1", "1e+300"]),
        ([decimal.Decimal("1.50")], pyarrow.decimal128(9, 2), ["1.50"]),
        ([datetime.date(2021, 3, 1), None], pyarrow.date32(), ["2021-03-01", None]),
        ([0, None], pyarrow.timestamp("ms"), ["1970-01-01T00:00:00.000", None]),
        ([1], pyarrow.timestamp("ns"), ["1970-01-01T00:00:00.000000001"]),
        (["2021-03-01"], pyarrow.large_string(), ["2021-03-01"]),
        (["x", "y", "x"], pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["x", "y", "x"]),
    ],
)
def test_a_parquet_column_is_read_by_its_declared_type(
    values: list[Any], kind: Any, expected: list[Cell], tmp_path: Path
) -> None:
    assert column(values, kind, tmp_path) == expected


@pytest.mark.parametrize(
    ("values", "kind", "what"),
    [
        ([b"x"], pyarrow.binary(), "binary data"),
        ([float("nan")], pyarrow.float64(), "nan"),
        ([float("inf")], pyarrow.float32(), "inf"),
        ([1], pyarrow.duration("s"), "a timedelta"),
        ([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8()), "a tuple"),
    ],
)
def test_what_is_no_text_is_refused_by_row_and_column(
    values: list[Any], kind: Any, what: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=rf"a.parquet, row 1: field 'a' holds {what}, which is"):
        column(values, kind, tmp_path)


@pytest.mark.parametrize("literal", ["NaN", "-Infinity", "[NaN]"])
def test_a_value_that_json_does_not_know_is_refused(literal: str, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", f'{{"a": 1}}\n{{"a": {literal}}}')
    with pytest.raises(UsageError, match=r"a.jsonl, line 2: field 'a' holds (NaN|-Infinity), whi"):
        read(file, "a")


def test_columns_that_nobody_asked_for_may_hold_anything(tmp_path: Path) -> None:
    lines = ['{"a": "x", "b": null}', '{"a": "y"}', '{"a": "z", "b": {"c": [NaN]}}', '{"b": 1}']
    assert read(written(tmp_path / "a.jsonl", "\n".join(lines)), "a") == [
        {"a": value} for value in ("x", "y", "z", None)
    ]
    table = pyarrow.table({"a": ["x"], "b": pyarrow.array([b"\xff"], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "a") == [{"a": "x"}]
    assert read(written(tmp_path / "a.csv", "b,a,b\n1,x,2\n"), "a") == [{"a": "x"}]


FAULTS = {
    "an empty file": (".jsonl", "", "a.jsonl is empty: leave it out, or fill it"),
    "no lines": (".jsonl", "\n \n", "a.jsonl holds no row"),
    "no items": (".json", "[ ]", "a.json holds no row"),
    "no rows": (".csv", "a,b\n", "a.csv holds no row below its header"),
    "no JSON": (".jsonl", '{"a": 1}\n{"a": oh}', "line 2: no JSON: Expecting value (column 7)"),
    "cut off": (".jsonl", '{"a": "b', "line 1: no JSON: Unterminated string"),
    "a stray comma": (
        ".jsonl",
        '{"a": 1},\n{"a": 2},',
        "line 1: no JSON: a stray comma (column 9)",
    ),
    "a comma within": (".jsonl", '{"a": 1}\n{"a": 1,}', "line 2: no JSON: a stray comma"),
    "an array": (".jsonl", '[{"a": 1}]', "expected an object such as", "into a .json file"),
    "a number": (".jsonl", '{"a": 1}\n7', "line 2: expected an object such as", "a boolean"),
    "pretty": (".jsonl", '{\n"a": 1}', "line 1: no JSON", "one object a line; an array"),
    "no array": (".json", '"a"', "expected an array of objects"),
    "an array in lines": (".json", '{"a":\n1}', "line 1: no JSON", "holds an array of objects"),
    "an array of numbers": (".json", '[{"a": 1}, 2]', "row 2: no object: '2]'"),
    "a comma at the end": (".json", '[{"a": 1}, ]', "row 2: a stray comma"),
    "two commas": (".json", '[{"a": 1},, {"a": 1}]', "row 2: a stray comma"),
    "no comma": (".json", '[{"a": 1} {"a": 2}]', "row 1: expected a comma or ] after it"),
    "an open array": (".json", '[{"a": 1}', "row 1: the file ends within its array"),
    "an open object": (".json", '[{"a": 1}, {"a": ', "row 2: no JSON: Expecting value"),
    "more than an array": (".json", '[{"a": 1}] x', "after its array comes 'x'"),
    "too deep": (".jsonl", '{"a": ' + "[" * 100_000, "line 1: nested too deeply"),
    "UTF-16": (".jsonl", '{"a": 1}'.encode("utf-16"), "is written in UTF-16: save it as UTF-8"),
    "UTF-16 unmarked": (".csv", "a\n1\n".encode("utf-16-le"), "is written in UTF-16 or UTF-32"),
    "Latin-1": (
        ".jsonl",
        '{"a": 1}\n{"a": "é"}'.encode("latin-1"),
        "line 2, is not UTF-8 (byte 0xe9",
    ),
    "Latin-1 array": (
        ".json",
        '[{"a": "é"}]'.encode("latin-1"),
        "not UTF-8 (byte 0xe9 at position 9)",
    ),
    "Latin-1 table": (".csv", "a\né\n".encode("latin-1"), "line 2, is not UTF-8 (byte 0xe9"),
    "a short row": (".csv", "b,a\n1,2\n3\n", "line 3: 1 cells, but the header names 2 columns"),
    "a long row": (".csv", "b,a\n1,2,3\n", "line 2: 3 cells, but the header names 2 columns"),
    "an open quote": (".csv", 'a\n1\n"2\n3\n', "line 3: no CSV: a quote that is never closed"),
    "two of a name": (".csv", "a,a\n1,2\n", "has 2 columns 'a': rename one"),
    "no parquet": (".parquet", "PAR1 but not really", "cannot be read as .parquet"),
    "no column": (".csv", "aa,b\n1,2\n", "has no field 'a' (nearest: aa); its fields are aa, b"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_a_message_of_its_own(fault: str, tmp_path: Path) -> None:
    suffix, content, *words = FAULTS[fault]
    file = written(tmp_path / f"a{suffix}", content)
    with pytest.raises(UsageError, match=re.escape(str(file))) as raised:
        read(file, "a")
    for word in words:
        assert str(word) in str(raised.value)


def test_a_mark_before_the_first_character_is_no_part_of_it(tmp_path: Path) -> None:
    for suffix, text in ((".jsonl", '{"a": 1}'), (".json", '[{"a": 1}]'), (".csv", "a\n1\n")):
        assert read(written(tmp_path / f"a{suffix}", codecs.BOM_UTF8 + text.encode()), "a") == [
            {"a": "1"}
        ]


@pytest.mark.parametrize(
    "name",
    ["site[1].jsonl", "a, b.jsonl", "*.jsonl", "~a.jsonl", "what?.JSONL", " x .Csv", "{a}.PARQUET"],
)
def test_a_name_is_a_name(name: str, tmp_path: Path) -> None:
    for other in ("site1.jsonl", "a", "b.jsonl", "x.jsonl", "whats.JSONL"):
        written(tmp_path / other, "not this")
    written(tmp_path / name, "x")
    assert data_files("data.path", str(tmp_path / name)) == (tmp_path / name,)


def test_a_folder_stands_for_its_data_in_any_case(tmp_path: Path) -> None:
    for name in ("b.JSONL", "a.csv", "notes.txt", "c.Parquet"):
        written(tmp_path / name, "x")
    assert [file.name for file in data_files("key", str(tmp_path))] == [
        "a.csv",
        "b.JSONL",
        "c.Parquet",
    ]


def test_a_pattern_finds_nothing_and_says_so(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "x")
    expected = r"data.path names '.*\*.jsonl', where .*; names are taken to the letter"
    with pytest.raises(UsageError, match=expected):
        data_files("data.path", f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{0}/a.jsonl,", "an empty name between two commas"),
        ("{0},{0}/a.jsonl", "twice"),
        ("", "no"),
    ],
)
def test_a_list_with_a_mistake_is_refused(text: str, words: str, tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "x")
    with pytest.raises(UsageError, match=words):
        data_files("data.path", text.format(tmp_path))


def test_what_is_nested_too_deeply_is_named_with_its_row_and_field(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"messages": ' + "[" * 900 + "]" * 900 + "}\n")
    with pytest.raises(UsageError, match=r"deep\.jsonl.*(line 1).*nested too deeply to be read"):
        list(open_table(file).rows(["messages"]))


def test_a_column_that_the_first_row_lacks_is_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "input": "d"}\n')
    table = open_table(file)
    assert table.columns == ("prompt", "response", "input")
    assert table.peek(["input", "response"]) == {"input": "d", "response": "b"}
