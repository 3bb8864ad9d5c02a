"""The examples of a run: the embedded docstrings, or a person's own files."""

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import UsageError, listing
from settings.run import EMBEDDED, DataSettings
from tasks.conversations import Turn
from tasks.standard_library import read_docstrings

CLASSIFICATION = "classification"
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
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


def read_examples(
    data: DataSettings, path: str | None = None, task: str = "causal"
) -> list[Example]:
    """All examples at `path` (default: data.path), in a fixed order.

    Raises UsageError where a file is missing or of no known kind, or a mapped field is not there;
    under classification also where an example has no label, or none of data.labels.
    """
    source = path or data.path
    if source == EMBEDDED and task == CLASSIFICATION:
        raise UsageError(
            "data.path=embedded reads docstrings, which have no labels: under task=classification "
            "name files of your own with data.path, their fields with data.text and data.label"
        )
    if source == EMBEDDED:
        return list(_embedded())
    examples: list[Example] = []
    for file in _files(source):
        found = _read_file(file, data, task)
        if task == CLASSIFICATION:
            _check_labels(found, data, file)
        examples += found
    if not examples:
        raise UsageError(f"{source} holds no examples")
    return examples


@lru_cache(maxsize=1)
def _embedded() -> tuple[Example, ...]:
    """The standard library's docstrings, exact repetitions left out."""
    unique = {(doc.code, doc.text): doc for doc in reversed(read_docstrings())}
    return tuple(Example(d.code, d.text, d.package) for d in reversed(unique.values()))


def _files(source: str) -> list[Path]:
    files: list[Path] = []
    for part in source.split(","):
        path = Path(part.strip()).expanduser()
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix in READERS)
        elif not path.is_file():
            raise UsageError(f"data.path names {part.strip()!r}, where there is no file or folder")
        elif path.suffix not in READERS:
            raise UsageError(f"data must be {', '.join(READERS)}; got {path.name}")
        else:
            files.append(path)
    if not files:
        raise UsageError(f"no {', '.join(READERS)} file in {source}")
    return files


def _check_labels(examples: Sequence[Example], data: DataSettings, file: Path) -> None:
    known = data.listed_labels()
    for row, example in enumerate(examples, start=1):
        if not example.response:
            raise UsageError(
                f"{file.name} has no label in field {data.label!r} of example {row}: label it or "
                "leave it out"
            )
        if known and example.response not in known:
            raise UsageError(
                f"{file.name} has the label {example.response!r} in example {row}, which is not "
                f"among data.labels ({listing(known)}): add it there, or leave the example out"
            )


def _read_file(file: Path, data: DataSettings, task: str) -> list[Example]:
    import datasets

    datasets.disable_progress_bars()
    if file.stat().st_size == 0:
        raise UsageError(f"{file} is empty: leave it out, or fill it")
    try:
        options = _as_text(file) if file.suffix == ".csv" else {}
        rows = datasets.load_dataset(
            READERS[file.suffix], data_files=str(file), split="train", **options
        )
    except Exception as error:  # the library raises many kinds for one bad file
        cause = error.__cause__ or error
        raise UsageError(
            f"{file} cannot be read as {file.suffix} with at least one row: "
            f"{str(cause) or type(cause).__name__}"
        ) from error
    if task == CLASSIFICATION:
        wanted = [data.text or data.prompt, data.label]
    else:
        wanted = [data.text] if data.text else [data.prompt, data.response]
    if data.partition == "dirichlet" or (data.partition == "natural" and data.field):
        wanted.append(data.field)
    for name in wanted:
        if name not in rows.column_names:
            raise UsageError(_missing_field(file, name, rows.column_names, task))
    return [_example(row, data, file, task) for row in rows]


def _as_text(file: Path) -> dict[str, Any]:
    """Options that take every cell of a CSV as it stands, where pandas would see types.

    None and NA are words there, and 007 is not 7.0.
    """
    import datasets

    with file.open(newline="", encoding="utf-8-sig") as lines:
        columns = next((row for row in csv.reader(lines) if row), [])
    text = {name: datasets.Value("string") for name in columns if name}
    return {"features": datasets.Features(text), "na_filter": False}


def _missing_field(file: Path, name: str, columns: Sequence[str], task: str) -> str:
    near = difflib.get_close_matches(name, columns, n=1)
    mapping = {
        "causal": "data.prompt and data.response, or data.text for running text",
        CLASSIFICATION: "data.text and data.label",
    }
    return (
        f"{file.name} has no field {name!r}; its fields are {listing(columns)}"
        + (f" (nearest: {near[0]})" if near else "")
        + f". Map them with {mapping[task]}"
        + "; partition by data.field, or with data.partition=iid."
    )


def _example(row: Mapping[str, Any], data: DataSettings, file: Path, task: str) -> Example:
    group = str(file) if data.partition == "files" else str(row.get(data.field, ""))
    if task == CLASSIFICATION:
        text = _text(row[data.text or data.prompt])
        return Example(text, _text(row[data.label]).strip(), group)
    if data.text:
        return Example("", _text(row[data.text]), group)
    return Example(_text(row[data.prompt]), _text(row[data.response]), group)


def _text(value: object) -> str:
    """Nothing is empty text; 0 and false are not nothing."""
    return "" if value is None else str(value)


def choose(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` of the examples (0: all), drawn by seed, in their order.

    >>> choose([Example("a", "b", ""), Example("c", "d", "")], limit=1, seed=0)[0].prompt
    'a'
    """
    if limit == 0 or limit >= len(examples):
        return list(examples)
    chosen = np.random.default_rng([seed, 1]).permutation(len(examples))[:limit]
    return [examples[index] for index in sorted(chosen)]
