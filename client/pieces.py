"""The parts of the global model that a site has kept, and those that came with this message."""

import hashlib
from functools import lru_cache
from pathlib import Path

from flwr.app import RecordDict

from adapters.adapter import Adapter, Delta
from adapters.terms import Term, sum_of_terms
from client.shelf import FolderShelf
from core.errors import BouquetError, listing
from wire.codec import unpack, unpack_delta
from wire.messages import Parts
from wire.records import PIECE, from_record


def held_pieces(cache: Path) -> list[str]:
    """The versions that lie whole in this folder, of any run."""
    held = set()
    for run in sorted(cache.glob("*")):
        shelf = FolderShelf(run)
        for name in shelf:
            if name.startswith(PIECE) and _version(shelf.get(name, b"")) == name[len(PIECE) :]:
                held.add(name[len(PIECE) :])
    return sorted(held)


def open_pieces(
    content: RecordDict, parts: Parts, shelf: FolderShelf | None
) -> tuple[Delta | None, Adapter | None]:
    """Merged, the sum of these parts, and the start where it is one of them.

    shelf: this run's. What came is put on it, and so is what only another run of this site has:
    `held_pieces` tells of all of them, so the server may count on it. What this run no longer needs
    is taken from it. Raises BouquetError where a piece neither came nor is there, or is not what
    its version says.
    """
    wanted, start = parts.needed, parts.start
    packed: dict[str, bytes] = {}
    missing = []
    for version in wanted:
        name = PIECE + version
        if name in content:
            packed[version] = from_record(content[name])
            if shelf is not None:
                _check(version, packed[version])
                shelf[name] = packed[version]
        elif shelf is not None and name in shelf:
            packed[version] = shelf[name]
        elif shelf is not None and (data := _of_another_run(shelf, version)) is not None:
            shelf[name] = packed[version] = data
        else:
            missing.append(version)
    if missing:
        raise BouquetError(
            f"this site lacks {len(missing)} of {len(wanted)} pieces of the global model "
            f"({listing(missing)}): it will be sent them in its next round"
        )
    for name in list(shelf or ()):
        if shelf is not None and name.startswith(PIECE) and name[len(PIECE) :] not in packed:
            del shelf[name]
    named = zip(parts.versions, parts.kinds, strict=True)
    terms = [(version, kind, packed[version]) for version, kind in named]
    return _opened(tuple(terms), (start, packed[start]) if start else None)


@lru_cache(maxsize=1)
def _opened(
    terms: tuple[tuple[str, str, bytes], ...], start: tuple[str, bytes] | None
) -> tuple[Delta | None, Adapter | None]:
    """One process that plays many clients checks, decodes and adds up the same pieces once."""
    begun = None
    if start is not None:
        _check(*start)
        begun = unpack(start[1])
    found = []
    for version, kind, packed in terms:
        _check(version, packed)
        found.append(Term(kind, unpack_delta(packed)))
    return sum_of_terms(found, begun), begun


def _check(version: str, packed: bytes) -> None:
    if _version(packed) != version:
        raise BouquetError(f"{PIECE}{version} does not match its version: damaged on the way")


def _of_another_run(shelf: FolderShelf, version: str) -> bytes | None:
    """The piece of this version from beside this run's shelf; None where it is not there whole."""
    for run in sorted(shelf.folder.parent.glob("*")):
        data = FolderShelf(run).get(PIECE + version)
        if data is not None and _version(data) == version:
            return data
    return None


def _version(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]
