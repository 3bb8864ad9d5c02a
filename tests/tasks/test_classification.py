"""Labels come from the settings or the data; texts keep their beginning and their class."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from core.errors import UsageError
from settings.keys import Value, as_list
from settings.run import DataSettings, run_settings
from tasks.classification import encode_texts
from tasks.examples import Example, read_data, read_examples
from tasks.labels import label_names
from tasks.partition import federate, global_held_out, own_part
from tools.rehearsal.tiny_models import tiny_tokenizer

TASK = "classification"


def data_at(path: object, **values: Value) -> DataSettings:
    """Data settings for this path; `client_held_out=0.1` sets data.client-held-out."""
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"data.path": str(path), "data.text": "text"}, layer).data


def write(file: Path, *rows: tuple[str, object]) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def labelled(file: Path, labels: Sequence[object]) -> Path:
    return write(file, *((f"text {index}", label) for index, label in enumerate(labels)))


def texts(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(text, label, "") for text, label in pairs]


def test_the_text_is_the_prompt_and_the_label_the_response(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ("good film", 1), ("", 0), ("bad film ", 0))
    data = data_at(file, partition="natural", field="label")
    reading = read_data(data, task=TASK)
    found = reading.examples
    assert [(e.prompt, e.response) for e in found] == [("good film", "1"), ("bad film ", "0")]
    assert [e.group for e in found] == ["1", "0"]
    assert (reading.counts, reading.labels) == ({"empty": 1}, {"1": 1, "0": 1})
    (tmp_path / "b.csv").write_text("body,verdict\nfine, pos \nso la la,neg\n")
    found = read_examples(
        data_at(tmp_path / "b.csv", text="", prompt="body", label="verdict"), task=TASK
    )
    assert found == texts(("fine", "pos"), ("so la la", "neg"))


@pytest.mark.parametrize(
    ("values", "field", "nearest"),
    [
        ({"text": "txt"}, "txt", "text"),
        ({"text": "", "prompt": "texts"}, "texts", "text"),
        ({"label": "labels"}, "labels", "label"),
    ],
)
def test_a_missing_field_is_named_with_the_nearest(
    values: dict[str, Value], field: str, nearest: str, tmp_path: Path
) -> None:
    file = labelled(tmp_path / "a.jsonl", [0, 1])
    expected = (
        f"a.jsonl has no field {field!r} (nearest: {nearest}); its fields are text, label. Map "
        "them with data.text and data.label"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_examples(data_at(file, **values), task=TASK)


def test_the_embedded_data_have_no_labels() -> None:
    expected = "data.path=embedded reads docstrings, which have no labels: .* name files of your"
    with pytest.raises(UsageError, match=expected):
        read_examples(data_at("embedded"), task=TASK)
    with pytest.raises(UsageError, match=expected):
        label_names(data_at("embedded"), TASK)


@pytest.mark.parametrize("label", [None, "", "  "])
def test_an_example_without_a_label_is_named(label: object, tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", ["x", "y", label])
    with pytest.raises(UsageError, match=r"a.jsonl, line 3 has no label in field 'label'"):
        read_examples(data_at(file), task=TASK)


def test_a_label_that_is_not_among_those_set_is_named(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", ["pos", "neg", "mixed", "odd"])
    expected = r"a.jsonl, line 3 has the label 'mixed', which is .* data.labels \(neg, pos\)"
    with pytest.raises(UsageError, match=expected):
        read_examples(data_at(file, labels="neg,pos"), task=TASK)
    assert len(read_examples(data_at(file, labels="neg,pos,odd,mixed"), task=TASK)) == 4


@pytest.mark.parametrize(
    ("in_file", "expected"),
    [
        ([1, 0, 1], ("0", "1")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9", "b"], ("10", "9", "b")),
        (["pos", "neg", "neg"], ("neg", "pos")),
        ([True, False], ("false", "true")),
        ([0, 0.0, "0", "0.00", 1, "1e0"], ("0", "1")),
        ([2.5, "-1", 10, "2.50"], ("-1", "2.5", "10")),
        (["007", "7"], ("007", "7")),
        ([9007199254740993, 9007199254740992], ("9007199254740992", "9007199254740993")),
    ],
)
def test_labels_in_the_data_are_sorted(
    in_file: list[object], expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert label_names(data_at(labelled(tmp_path / "a.jsonl", in_file)), TASK) == expected


def test_labels_that_are_set_keep_their_order_and_are_not_looked_for(tmp_path: Path) -> None:
    data = data_at(tmp_path / "nowhere.jsonl", labels=" pos, neg ,so-so")
    assert label_names(data, TASK) == ("pos", "neg", "so-so")
    assert label_names(data, TASK, "/a/site/of.jsonl") == ("pos", "neg", "so-so")


def test_a_label_is_one_class_however_a_file_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t", "label": 0}\n{"text": "u", "label": 1.0}\n')
    (tmp_path / "b.csv").write_text("text,label\nt,0.0\nu,1\n")
    kinds = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.int64())])
    table = pyarrow.Table.from_pylist([{"text": "t", "label": 1}], kinds)
    parquet.write_table(table, tmp_path / "c.parquet")
    kinds = pyarrow.schema([("text", pyarrow.string()), ("label", pyarrow.float32())])
    table = pyarrow.Table.from_pylist([{"text": "t", "label": 0.0}], kinds)
    parquet.write_table(table, tmp_path / "d.parquet")
    assert label_names(data_at(tmp_path), TASK) == ("0", "1")
    assert read_data(data_at(tmp_path, labels="1.0,0"), task=TASK).labels == {"0": 3, "1": 3}
    assert label_names(data_at(tmp_path, labels="1.0,0"), TASK) == ("1", "0")


def test_labels_may_hold_commas(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", ["yes, but", "no"])
    labels = as_list(label_names(data_at(file), TASK))
    assert label_names(data_at(file, labels=labels), TASK) == ("no", "yes, but")
    assert len(read_examples(data_at(file, labels='["yes, but", "no"]'), task=TASK)) == 2


def test_a_task_without_classes_has_no_labels(tmp_path: Path) -> None:
    assert label_names(data_at(tmp_path / "nowhere.jsonl"), "causal") == ()
    assert label_names(data_at(tmp_path / "nowhere.jsonl", labels="a,b"), "causal") == ()


@pytest.mark.parametrize("labels", ["one", "a,a", "a,,b", ",", "0,0.0"])
def test_fewer_than_two_distinct_labels_are_refused(labels: str) -> None:
    with pytest.raises(UsageError, match=r"expected at least two labels, none empty and each once"):
        label_names(data_at("nowhere.jsonl", labels=labels), TASK)


def test_data_of_one_label_are_refused(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", [3, 3, 3])
    with pytest.raises(UsageError, match=r"a.jsonl has one label only in field 'label', 3, and"):
        label_names(data_at(file), TASK)


def test_a_sites_own_data_cannot_tell_the_labels(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", [0, 1])
    expected = "data.labels is empty, and .*a.jsonl holds this site's labels only: set data.labels"
    with pytest.raises(UsageError, match=expected):
        label_names(data_at(file), TASK, str(file))


def test_the_task_goes_through_every_way_to_the_data(tmp_path: Path) -> None:
    file = labelled(tmp_path / "a.jsonl", [0, 1] * 30)
    data = data_at(file, partition="dirichlet", field="label", dirichlet_alpha=5.0)
    federation = federate(data, 2, 0, TASK)
    parts = [example for part in federation.parts for example in part.train + part.held_out]
    everyone = parts + federation.held_out
    assert {example.response for example in everyone} == {"0", "1"}
    assert sorted(example.prompt for example in everyone) == sorted(f"text {i}" for i in range(60))
    assert global_held_out(data, 2, 0, 0, TASK) == federation.held_out
    own = own_part(data, str(file), 0, TASK)
    assert len(own.train + own.held_out) == 60
    assert {example.response for example in own.train} == {"0", "1"}


@pytest.mark.parametrize(
    ("tokenizer", "around"),
    [
        (tiny_tokenizer(adds="both"), ("<s>", "</s>")),
        (tiny_tokenizer(adds="bos"), ("<s>", "")),
        (tiny_tokenizer("<|end|>", "<|end|>", None, adds=""), ("", "")),
    ],
    ids=["both", "bos", "none"],
)
@pytest.mark.parametrize("words", [3, 80])
def test_a_text_keeps_its_beginning_and_its_special_tokens(
    words: int, tokenizer: Any, around: tuple[str, str]
) -> None:
    text = "naïve café " * words
    data = data_at("mine.jsonl", context=40, template="{prompt}!", ending="##")
    found = encode_texts(tokenizer, texts((text, "b")), data, ["a", "b"])
    (encoded,) = found.examples
    decoded = tokenizer.decode(encoded.ids.tolist())
    begin, end = around
    assert decoded.startswith(begin)
    assert decoded.endswith(end)
    body = decoded.removeprefix(begin).removesuffix(end)
    assert (found.cut, found.dropped, encoded.label) == (int(words == 80), 0, 1)
    if words == 80:
        assert len(encoded.ids) == 40
        assert text.encode().startswith(body.rstrip("\ufffd").encode())
        assert len(body) > 40
    else:
        assert body == text


def test_a_text_that_just_fits_is_not_cut() -> None:
    tokenizer = tiny_tokenizer(adds="both")
    example = texts(("the quick brown fox jumps over the lazy dog", "a"))
    whole = tokenizer(example[0].prompt)["input_ids"]
    for context, cut in ((len(whole), 0), (len(whole) - 1, 1)):
        found = encode_texts(tokenizer, example, data_at("m.jsonl", context=context), "ab")
        assert (found.cut, len(found.examples[0].ids)) == (cut, context)
    assert found.examples[0].ids.tolist() == [*whole[:-2], whole[-1]]


def test_empty_texts_are_dropped_and_the_others_keep_their_classes() -> None:
    examples = texts(("", "a"), ("one", "b"), (" \n\t", "c"), ("two", "c"), ("three", "a"))
    found = encode_texts(tiny_tokenizer(), examples, data_at("mine.jsonl"), ["c", "a", "b"])
    assert [example.label for example in found.examples] == [2, 0, 1]
    assert (found.cut, found.dropped) == (0, 2)
    none = encode_texts(tiny_tokenizer(), examples[:1], data_at("mine.jsonl"), ["a", "b"])
    assert (none.examples, none.dropped) == ([], 1)


def test_a_label_unknown_to_the_run_is_named() -> None:
    expected = r"hold the label 'x', which is not among the labels of the run \(a, b\)"
    with pytest.raises(UsageError, match=expected):
        encode_texts(tiny_tokenizer(), texts(("t", "x")), data_at("mine.jsonl"), ["a", "b"])


@pytest.mark.parametrize("words", [1, 80])
def test_special_tokens_in_a_text_are_text_and_counted(words: int) -> None:
    tokenizer = tiny_tokenizer(adds="both")
    examples = texts(("one </s>" * words, "a"), ("two", "b"))
    data = data_at("mine.jsonl", context=40)
    found = encode_texts(tokenizer, examples, data, ["a", "b"])
    assert found.counts == {"special-tokens": 1} | ({"cut": 1} if words == 80 else {})
    for encoded in found.examples:
        special = [i for i in encoded.ids.tolist() if i in tokenizer.all_special_ids]
        assert special == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(found.examples[0].ids.tolist()).startswith("<s>one </s>")
    assert tokenizer.eos_token_id in tokenizer("</s>", add_special_tokens=False)["input_ids"]
