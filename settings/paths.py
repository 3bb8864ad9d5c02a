"""Files and folders that the configuration names: which they are, and as absolute paths."""

import os
from pathlib import Path

from settings.keys import as_list, listed


def named_paths(text: str, folder: Path | None = None) -> tuple[str, ...]:
    """The names in a text: one, where a file or folder of exactly that name exists, else a list.

    So commas, spaces and brackets are plain characters in the name of a file that is there.
    folder: where relative names begin; by default where the command runs.

    >>> named_paths("no such file.jsonl, nor this.jsonl")
    ('no such file.jsonl', 'nor this.jsonl')
    """
    return (text,) if text and os.path.exists(_from(folder, text)) else listed(text)  # noqa: PTH110


def absolute_path(text: str, folder: Path | None = None) -> str:
    """One name as an absolute path; nothing stays nothing."""
    return str(_from(folder, text).absolute()) if text else ""


def absolute_paths(text: str, folder: Path | None = None) -> str:
    """A text that names the same files by their absolute paths.

    >>> absolute_paths("/a.jsonl, /b.jsonl"), absolute_paths("")
    ('/a.jsonl,/b.jsonl', '')
    """
    return as_list([absolute_path(name, folder) for name in named_paths(text, folder)])


def _from(folder: Path | None, text: str) -> Path:
    # Unlike Path.expanduser, this leaves ~a.jsonl alone where there is no user of that name.
    return (folder or Path()) / os.path.expanduser(text)  # noqa: PTH111
