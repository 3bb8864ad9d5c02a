"""Files that only their owner may read."""

import os
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 600 that never existed with another mode; replaces one that is there."""
    scratch = path.with_name(f".writing-{path.name}")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    scratch.replace(path)


def may_others_read(path: Path) -> bool:
    """Whether group or others have any right to it."""
    return bool(path.stat().st_mode & 0o077)
