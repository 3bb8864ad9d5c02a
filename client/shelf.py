"""Where a client keeps bytes under a name: in Flower's memory, or in a folder of the site.

Flower holds what is in a node's state as long as its process lives. A site that names a cache-path
keeps it on its disk instead, where it outlives a kill.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from flwr.app import ArrayRecord, RecordDict

from core.errors import BouquetError
from wire.records import from_record, to_record

DIGEST_BYTES = 32
RUNS_KEPT = 4


class RecordShelf(MutableMapping[str, bytes]):
    """Names in a Flower record.

    >>> shelf = RecordShelf(RecordDict())
    >>> shelf["memory-000001"] = b"abc"
    >>> list(shelf), shelf["memory-000001"]
    (['memory-000001'], b'abc')
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def __getitem__(self, name: str) -> bytes:
        record = self._state[name]
        assert isinstance(record, ArrayRecord)
        return from_record(record)

    def __setitem__(self, name: str, data: bytes) -> None:
        self._state[name] = to_record(data)

    def __delitem__(self, name: str) -> None:
        del self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._state))

    def __len__(self) -> int:
        return len(self._state)


class FolderShelf(MutableMapping[str, bytes]):
    """Names in a folder, each a file that holds a SHA-256 and the data.

    A file is written whole or not at all; one that no longer matches its hash is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> bytes:
        try:
            found = self._path(name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None
        digest, data = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise KeyError(name)
        return data

    def __setitem__(self, name: str, data: bytes) -> None:
        path = self._path(name)
        scratch = path.with_name(f".writing-{os.getpid()}-{name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        except OSError as error:
            raise BouquetError(
                f"the site's cache-path cannot be written: {path}: {error.strerror}; free some "
                "space, or start the site without cache-path"
            ) from error

    def __delitem__(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        names = (path.name for path in self.folder.glob("*") if path.is_file())
        return iter(sorted(name for name in names if not name.startswith(".")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
            raise BouquetError(f"a name on a shelf is of letters, digits and -; got {name!r:.80}")
        return self.folder / name


def run_shelf(cache: Path, run: str) -> FolderShelf:
    """What a site keeps of one run; of all runs, the newest four stay."""
    shelf = FolderShelf(FolderShelf(cache)._path(run))
    shelf.folder.mkdir(parents=True, exist_ok=True)
    os.utime(shelf.folder)
    runs = sorted((p for p in cache.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in runs[:-RUNS_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return shelf
