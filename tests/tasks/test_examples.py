"""Examples come out of every kind of file as they went in, and a bad file says what is wrong."""

import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from core.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.examples import Example, Turn, choose, fingerprint_of, read_data, read_examples
from tests.adapter_generators import QUICK

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
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]) if rows else ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: Sequence[Row]) -> None:
    kinds = pyarrow.schema([(name, pyarrow.string()) for name in ROWS[0]])
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), kinds), file)


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
    assert read_examples(data_at(file, partition="natural", field="kind")) == EXAMPLES


def test_fields_are_mapped_by_name(tmp_path: Path) -> None:
    rows = [{"question": "why?", "answer": "because", "prompt": "decoy", "response": "decoy"}]
    write_jsonl(tmp_path / "qa.jsonl", rows)
    data = data_at(tmp_path / "qa.jsonl", prompt="question", response="answer")
    assert read_examples(data) == [Example("why?", "because", "")]


def test_running_text_is_a_response_without_a_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"body": "once upon a time", "kind": "tale"}])
    data = data_at(tmp_path / "text.jsonl", text="body", partition="natural", field="kind")
    assert read_examples(data) == [Example("", "once upon a time", "tale")]


def test_zero_and_false_are_values_and_a_prompt_may_be_null(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": 7, "response": 0, "flag": False},
        {"prompt": None, "response": 1, "flag": True},
    ]
    write_jsonl(tmp_path / "numbers.jsonl", rows)
    numbers = read_examples(data_at(tmp_path / "numbers.jsonl"))
    assert [(example.prompt, example.response) for example in numbers] == [("7", "0"), ("", "1")]
    flags = read_examples(data_at(tmp_path / "numbers.jsonl", response="flag"))
    assert [example.response for example in flags] == ["false", "true"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_what_trains_is_the_literal_of_the_file(suffix: str, tmp_path: Path) -> None:
    """Dates stay text, whole numbers beside fractions stay whole, large ones keep their digits."""
    literals = ["1", "4.5", "9007199254740993", "true", "1e2", "-0.0", "0.1000", "1E+400"]
    texts = ["2021-03-01", "2021-03-01T00:00:00Z", "12:30", "007", "True", "NaN"]
    rows = [f'{{"prompt": "p", "response": {text}}}' for text in literals]
    rows += [f'{{"prompt": "p", "response": "{text}"}}' for text in texts]
    file = tmp_path / f"rows{suffix}"
    file.write_text("\n".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    assert [e.response for e in read_examples(data_at(file))] == literals + texts


def test_rows_without_anything_to_learn_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "response": text} for text in ("a", "", None, None, " ")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    reading = read_data(data_at(tmp_path / "rows.jsonl"))
    assert [example.response for example in reading.examples] == ["a", " "]
    assert reading.counts == {"empty": 1, "null": 2}
    assert reading.sources[0].rows == 5


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (["", ""], "all 2 responses of .*c2.jsonl are empty (field response): fill them"),
        ([None], "all 1 responses of .*c2.jsonl are null (field response)"),
        ([None, "", ""], "of 3 responses of .*c2.jsonl, 2 are empty and 1 null"),
    ],
)
def test_a_file_with_nothing_to_learn_is_refused_by_name(
    responses: list[str | None], reason: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "c1.jsonl", ROWS)
    write_jsonl(tmp_path / "c2.jsonl", [{"prompt": "p", "response": text} for text in responses])
    with pytest.raises(UsageError, match=re.escape(reason).replace(r"\.\*", ".*")):
        read_examples(data_at(tmp_path))


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}])
def test_nothing_ever_trains_on_what_python_prints_of_a_list(value: object, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"prompt": "p", "response": value}])
    with pytest.raises(UsageError, match=r"a.jsonl, line 4: field 'response' holds an? \w+, where"):
        read_examples(data_at(tmp_path / "a.jsonl"))


def test_conversations_are_found_where_no_key_names_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "1"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns, "source": 1}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": turns[:1], "completion": turns[1:]}])
    reading = read_data(data_at(tmp_path))
    expected = (Turn("user", "hi"), Turn("assistant", "1"))
    assert [(e.turns, e.prompt, e.response) for e in reading.examples] == [(expected, "", "")] * 2
    assert reading.found == (
        "conversations in field messages",
        "conversations in fields prompt, completion",
    )


def test_a_completion_of_plain_text_is_the_response(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    reading = read_data(data_at(tmp_path / "a.jsonl"))
    assert reading.examples == [Example("p", "c", "")]
    assert reading.found == ("responses in field completion",)


def test_a_template_brings_the_other_fields_that_it_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r", "input": None, "n": 1.50}])
    data = data_at(tmp_path / "a.jsonl", template="{prompt} {input} {n}: ")
    assert read_examples(data)[0].fields == (("input", ""), ("n", "1.5"))


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "\\ud83d"}')
    with pytest.raises(UsageError, match=r"a.jsonl, line 1: field 'response' .* lone surrogate"):
        read_examples(data_at(tmp_path / "a.jsonl"))


def test_a_fingerprint_is_of_what_was_read_and_of_nothing_else(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_csv(tmp_path / "moved.csv", [{**row, "kind": "other"} for row in ROWS])
    write_jsonl(tmp_path / "b.jsonl", [*ROWS[:2], {**ROWS[2], "response": "🌷 "}])
    write_jsonl(tmp_path / "c.jsonl", ROWS[::-1])

    def found(name: str, **values: Value) -> str:
        reading = read_data(data_at(tmp_path / name, **values))
        return fingerprint_of(reading.sources)

    same = found("a.jsonl")
    assert re.fullmatch("[0-9a-f]{32}", same)
    assert found("moved.csv") == same
    assert len({same, found("b.jsonl"), found("c.jsonl"), found("a.jsonl", response="kind")}) == 4


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 60), st.integers(0, 2**31)
)
@QUICK
def test_a_limit_draws_from_all_files_in_their_order(
    sizes: list[int], limit: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for k, size in enumerate(sizes):
            rows: list[Row] = [{"prompt": f"{k}", "response": f"{i:02d}"} for i in range(size)]
            write_jsonl(Path(folder, f"{k}.jsonl"), rows)
        data = data_at(folder)
        drawn = [(e.prompt, e.response) for e in read_data(data, limit=limit, seed=seed).examples]
        everything = [(e.prompt, e.response) for e in read_examples(data)]
        assert len(drawn) == min(limit, len(everything))
        assert [each for each in everything if each in set(drawn)] == drawn
        again = read_data(data, limit=limit, seed=seed).examples
        assert [(e.prompt, e.response) for e in again] == drawn


def test_a_limit_gives_every_row_the_same_chance(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": f"{i}"} for i in range(20)])
    data = data_at(tmp_path / "a.jsonl")
    times = Counter(
        e.response for seed in range(400) for e in read_data(data, limit=5, seed=seed).examples
    )
    assert len(times) == 20
    assert all(60 < count < 140 for count in times.values())  # 100, standard deviation 8.7


def test_a_cell_of_a_csv_is_text_as_it_stands(tmp_path: Path) -> None:
    cells = ["None", "NA", "null", "007", "1.50", "true", "", " x "]
    lines = [",prompt,response", *(f"{n},{n},{cell}" for n, cell in enumerate(cells))]
    (tmp_path / "cells.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    examples = read_examples(data_at(tmp_path / "cells.csv"))
    assert [example.response for example in examples] == [cell for cell in cells if cell]
    assert examples[3].prompt == "3"


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:2])
    write_csv(tmp_path / "a.csv", ROWS[:1])
    write_parquet(tmp_path / "c.parquet", ROWS[2:])
    (tmp_path / "notes.txt").write_text("not data")
    assert read_examples(data_at(tmp_path, partition="natural", field="kind")) == EXAMPLES


def test_several_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "z.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    both = f"{tmp_path / 'z.jsonl'}, {tmp_path / 'a.jsonl'}"
    assert read_examples(data_at(both, partition="natural", field="kind")) == EXAMPLES


def test_under_files_the_group_is_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    examples = read_examples(data_at(tmp_path, partition="files", field="kind"))
    assert [Path(example.group).name for example in examples] == ["one.jsonl"] * 3 + [
        "two.jsonl"
    ] * 3


def test_a_path_of_its_own_is_read_instead_of_the_runs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "site.jsonl", ROWS)
    data = data_at(tmp_path / "nowhere.jsonl", partition="natural", field="kind")
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
    ],
)
def test_a_missing_field_is_named_with_those_there_are_and_the_nearest(
    values: dict[str, Value], missing: str, nearest: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = (
        f"rows.jsonl has no field {missing!r} (nearest: {nearest}); its fields are prompt, "
        "response, kind. Map them with data.prompt and data.response"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_examples(data_at(tmp_path / "rows.jsonl", **values))


@pytest.mark.parametrize("partition", ["natural", "dirichlet"])
def test_a_missing_field_to_deal_by_is_the_partitions_fault(partition: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = (
        f"data.partition={partition} deals by a field, and {tmp_path}/rows.jsonl has no field "
        "'kin' (nearest: kind); its fields are prompt, response, kind. Name one with data.field, "
        "or take data.partition=iid"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_examples(data_at(tmp_path / "rows.jsonl", partition=partition, field="kin"))


@pytest.mark.parametrize("partition", ["natural", "dirichlet"])
def test_a_partition_without_a_field_says_so_and_names_the_fields(
    partition: str, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = (
        f"data.field names no field: data.partition={partition} deals by the values of one. Choose "
        f"among those of {tmp_path}/rows.jsonl, prompt, response, kind (--set "
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_examples(data_at(tmp_path / "rows.jsonl", partition=partition))


def test_the_partition_field_is_not_asked_for_where_nothing_goes_by_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    examples = read_examples(data_at(tmp_path / "rows.jsonl", field="nothing", partition="iid"))
    assert {example.group for example in examples} == {""}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.jsonl', where there is no file or folder"):
        read_examples(data_at(tmp_path / "nowhere.jsonl"))


def test_a_file_of_another_kind_is_refused_with_the_kinds_there_are(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"data must be .jsonl, .json, .csv, .parquet; got .*rows"):
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
    with pytest.raises(UsageError, match=r"head\.\w+ holds no row.*: leave it out, or fill it"):
        read_examples(data_at(tmp_path / f"head{suffix}"))


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


def test_a_conversation_is_found_where_its_first_row_is_null(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": None}, {"messages": talk}])
    reading = read_data(data_at(tmp_path / "rows.jsonl"))
    assert [len(example.turns) for example in reading.examples] == [2]
    assert reading.counts == {"null": 1}
    assert reading.found == ("conversations in field messages",)


def test_messages_that_are_text_are_refused_as_such(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": "Hi"}])
    with pytest.raises(UsageError, match="field 'messages' holds no list of messages in its first"):
        read_examples(data_at(tmp_path / "rows.jsonl"))


def test_prompts_that_are_null_or_misspelt_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r"}, {"promt": "q", "response": "s"}]
    write_jsonl(tmp_path / "some.jsonl", [*rows, {"prompt": None, "response": "t"}])
    reading = read_data(data_at(tmp_path / "some.jsonl"))
    assert reading.counts == {"null-prompt": 2}
    assert [example.prompt for example in reading.examples] == ["p", "", ""]
    write_jsonl(tmp_path / "all.jsonl", [{"prompt": None, "response": "r"}] * 3)
    with pytest.raises(UsageError, match=r"all prompts of .*all\.jsonl are null \(field prompt\)"):
        read_data(data_at(tmp_path / "all.jsonl"))


def test_a_preset_reads_files_without_its_optional_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "Add.", "output": "2"}])
    (example,) = read_data(data_at(tmp_path / "rows.jsonl", template="alpaca")).examples
    assert example.fields == (("instruction", "Add."), ("input", ""))


def test_a_field_that_the_template_names_wrongly_is_the_templates_fault(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(UsageError, match=r"\(nearest: question\).* data.template names {questoin}"):
        read_data(data_at(tmp_path / "rows.jsonl", template="{questoin}\n"))


def test_columns_beside_a_conversation_that_are_not_used_are_named(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"system": "Be brief.", "conversations": talk}])
    (words,) = read_data(data_at(tmp_path / "rows.jsonl")).found
    assert words == "conversations in field conversations; not used: system"
