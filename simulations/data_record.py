"""What a run knows of its data: each file with the hash of what was read of it.

    {"data": [{"file": "/srv/train.jsonl", "rows": 7473, "hash": "16b4..."}], "evaluation": []}

A file may move or be renamed, and may be touched: what counts is the columns that were read.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import UsageError
from tasks.examples import Source
from tasks.partition import Federation

PARTS = {
    "data": "data.path",
    "evaluation": "data.evaluation",
    "chat-template": "data.chat-template-file",
}


def data_record(federation: Federation, chat_template_file: str = "") -> dict[str, Any]:
    """The record of a federation's data, and of the template that its conversations go through.

    Raises UsageError where that file cannot be read.
    """
    parts = {
        "data": federation.sources,
        "evaluation": federation.tests,
        "chat-template": _template(chat_template_file) if chat_template_file else (),
    }
    return {name: [_entry(source) for source in sources] for name, sources in parts.items()}


def _template(file: str) -> tuple[Source]:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"data.chat-template-file names {file}, which cannot be read: {error.strerror}"
        ) from error
    rows = len(content.splitlines())
    return (Source(file, rows, hashlib.sha256(content).hexdigest()),)


def _entry(source: Source) -> dict[str, Any]:
    return {"file": source.path, "rows": source.rows, "hash": source.fingerprint}


def refuse_changed_data(before: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """UsageError that names the first file which is not what it was when `run` began.

    A record without a part says nothing of it.
    """
    for part, key in PARTS.items():
        if part not in before:
            continue
        old, new = before[part], now.get(part, [])
        if len(old) != len(new):
            raise UsageError(
                f"{run} was begun on {len(old)} files of {key}, and now there are {len(new)}: "
                "give it the same ones, or begin a new run"
            )
        for was, found in zip(old, new, strict=True):
            if was["hash"] != found["hash"]:
                moved = "" if was["file"] == found["file"] else f", then {was['file']},"
                raise UsageError(
                    f"{found['file']}{moved} has changed since {run} began: it held "
                    f"{was['rows']:,} rows with the hash {was['hash'][:16]}, and holds "
                    f"{found['rows']:,} with {found['hash'][:16]}. Bring the data back, or begin "
                    "a new run"
                )
