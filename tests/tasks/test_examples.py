"""Examples come out of every kind of file as they went in, and a bad file says what is wrong."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest

from adapters.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.examples import Example, choose, read_examples

Row = dict[str, Any]
ROWS: list[Row] = [
    {"prompt": "1 + 1", "response": "two", "kind": "sum"},
    {"prompt": "a, b\nand c", "response": 'say "hi"', "kind": "text"},
    {"prompt": "Köln 東京", "response": "🌷", "kind": "text"},
]
EXAMPLES = [Example(row["prompt"], row["response"], row["kind"]) for row in ROWS]


def write_jsonl(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, rows: Sequence[Row]) -> None:
    file.write_text(json.dumps(list(rows)), encoding="utf-8")


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    pandas.DataFrame(rows, columns=list(rows[0]) if rows else ["prompt", "response"]).to_csv(
        file, index=False
    )


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    pandas.DataFrame(rows).to_parquet(file)


WRITERS: dict[str, Callable[[Path, Sequence[Row]], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def data_at(path: object, **values: Value) -> DataSettings:
    """Data settings for this path; `chat_template=True` sets data.chat-template."""
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"data.path": str(path)}, layer).data


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_kind_of_file_gives_its_rows_in_order(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    WRITERS[suffix](file, ROWS)
    assert read_examples(data_at(file, field="kind")) == EXAMPLES


def test_fields_are_mapped_by_name(tmp_path: Path) -> None:
    rows = [{"question": "why?", "answer": "because", "prompt": "decoy", "response": "decoy"}]
    write_jsonl(tmp_path / "qa.jsonl", rows)
    data = data_at(tmp_path / "qa.jsonl", prompt="question", response="answer")
    assert read_examples(data) == [Example("why?", "because", "")]


def test_running_text_is_a_response_without_a_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"body": "once upon a time", "kind": "tale"}])
    data = data_at(tmp_path / "text.jsonl", text="body", field="kind")
    assert read_examples(data) == [Example("", "once upon a time", "tale")]


def test_nothing_is_empty_but_zero_and_false_are_values(tmp_path: Path) -> None:
    rows = [
        {"prompt": 7, "response": 0, "flag": False},
        {"prompt": None, "response": 1, "flag": True},
    ]
    write_jsonl(tmp_path / "numbers.jsonl", rows)
    numbers = read_examples(data_at(tmp_path / "numbers.jsonl"))
    assert [(example.prompt, example.response) for example in numbers] == [("7", "0"), ("", "1")]
    flags = read_examples(data_at(tmp_path / "numbers.jsonl", response="flag"))
    assert [example.response for example in flags] == ["False", "True"]


def test_a_cell_of_a_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    cells = ["None", "NA", "null", "007", "1.50", "true", "", " x "]
    lines = [",prompt,response", *(f"{n},{n},{cell}" for n, cell in enumerate(cells))]
    (tmp_path / "cells.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    examples = read_examples(data_at(tmp_path / "cells.csv"))
    assert [example.response for example in examples] == cells
    assert examples[3].prompt == "3"


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:2])
    write_csv(tmp_path / "a.csv", ROWS[:1])
    write_parquet(tmp_path / "c.parquet", ROWS[2:])
    (tmp_path / "notes.txt").write_text("not data")
    assert read_examples(data_at(tmp_path, field="kind")) == EXAMPLES


def test_several_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "z.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    both = f"{tmp_path / 'z.jsonl'}, {tmp_path / 'a.jsonl'}"
    assert read_examples(data_at(both, field="kind")) == EXAMPLES


def test_under_files_the_group_is_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    examples = read_examples(data_at(tmp_path, partition="files", field="kind"))
    assert [Path(example.group).name for example in examples] == ["one.jsonl"] * 3 + [
        "two.jsonl"
    ] * 3


def test_a_path_of_its_own_is_read_instead_of_the_runs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "site.jsonl", ROWS)
    data = data_at(tmp_path / "nowhere.jsonl", field="kind")
    assert read_examples(data, str(tmp_path / "site.jsonl")) == EXAMPLES


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS)
    assert len(read_examples(data_at(file))) == 3
    write_jsonl(file, ROWS[:2])
    assert len(read_examples(data_at(file))) == 2


@pytest.mark.parametrize(
    ("values", "missing", "nearest"),
    [
        ({"prompt": "promt"}, "promt", "prompt"),
        ({"response": "respons"}, "respons", "response"),
        ({"text": "knd"}, "knd", "kind"),
        ({"partition": "natural", "field": "kinds"}, "kinds", "kind"),
        ({"partition": "dirichlet", "field": "kin"}, "kin", "kind"),
    ],
)
def test_a_missing_field_is_named_with_those_there_are_and_the_nearest(
    values: dict[str, Value], missing: str, nearest: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = (
        f"rows.jsonl has no field {missing!r}; its fields are prompt, response, kind "
        f"(nearest: {nearest}). Map them with data.prompt and data.response"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_examples(data_at(tmp_path / "rows.jsonl", **values))


def test_the_partition_field_is_not_asked_for_where_nothing_goes_by_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    examples = read_examples(data_at(tmp_path / "rows.jsonl", field="nothing", partition="iid"))
    assert {example.group for example in examples} == {""}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.jsonl', where there is no file or folder"):
        read_examples(data_at(tmp_path / "nowhere.jsonl"))


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"data must be .jsonl, .json, .csv, .parquet; got rows"):
        read_examples(data_at(tmp_path / "rows.txt"))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not data")
    with pytest.raises(UsageError, match=r"no .jsonl, .json, .csv, .parquet file in "):
        read_examples(data_at(tmp_path))


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"empty{suffix}").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"empty{re.escape(suffix)} is empty"):
        read_examples(data_at(tmp_path / f"empty{suffix}"))


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_table_without_rows_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    WRITERS[suffix](tmp_path / f"head{suffix}", [])
    with pytest.raises(
        UsageError, match=rf"head.\w+ cannot be read as {suffix} with at least one row: \S"
    ):
        read_examples(data_at(tmp_path / f"head{suffix}"))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": oh no\n')
    with pytest.raises(UsageError, match=r"bad.jsonl cannot be read as .jsonl with at .* row: \S"):
        read_examples(data_at(tmp_path / "bad.jsonl"))


def test_chosen_examples_keep_their_order_and_follow_the_seed() -> None:
    many = [Example(f"{index:03d}", "", "") for index in range(200)]
    chosen = choose(many, 50, seed=3)
    prompts = [example.prompt for example in chosen]
    assert len(set(prompts)) == 50
    assert prompts == sorted(prompts)
    assert chosen == choose(many, 50, seed=3)
    assert chosen != choose(many, 50, seed=4)


@pytest.mark.parametrize("limit", [0, 3, 4])
def test_a_limit_of_zero_or_beyond_the_examples_takes_all(limit: int) -> None:
    assert choose(EXAMPLES, limit, seed=0) == EXAMPLES
