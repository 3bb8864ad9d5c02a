"""What a run knows of its data: that a file is still what it was."""

from collections.abc import Mapping
from typing import Any

from core.errors import UsageError

PARTS = {
    "data": "data.path",
    "evaluation": "data.evaluation",
    "chat-template": "data.chat-template-file",
}


def refuse_changed_data(before: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """UsageError that names the first file which is not what it was when `run` began.

    A record without a part says nothing of it.
    """
    for part, key in PARTS.items():
        if part not in before or part not in now:
            continue
        old, new = before[part], now[part]
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
