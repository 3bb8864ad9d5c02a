"""The parts of `merged` that a site has kept, and those that came with this message."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flwr.app import RecordDict

from adapters.adapter import Adapter
from adapters.algebra import stack
from adapters.codec import unpack
from adapters.errors import BouquetError, listing
from adapters.records import PIECE, from_record
from client.shelf import FolderShelf


def held_pieces(cache: Path) -> list[str]:
    """The versions that lie whole in this folder, of any run."""
    held = set()
    for run in sorted(cache.glob("*")):
        shelf = FolderShelf(run)
        for name in shelf:
            if name.startswith(PIECE) and _version(shelf.get(name, b"")) == name[len(PIECE) :]:
                held.add(name[len(PIECE) :])
    return sorted(held)


def sum_of_pieces(
    content: RecordDict, versions: Sequence[str], shelf: FolderShelf | None
) -> Adapter | None:
    """Merged: the pieces of these versions side by side, in this order; None where there is none.

    shelf: this run's. What came is put on it, and so is what only another run of this site has:
    `held_pieces` tells of all of them, so the server may count on it. What this run no longer needs
    is taken from it. Raises BouquetError where a piece neither came nor is there, or is not what
    its version says.
    """
    packed: dict[str, bytes] = {}
    missing = []
    for version in versions:
        name = PIECE + version
        if name in content:
            packed[name] = from_record(content[name])
            if _version(packed[name]) != version:
                raise BouquetError(f"{name} does not match its version: damaged on the way")
            if shelf is not None:
                shelf[name] = packed[name]
        elif shelf is not None and name in shelf:
            packed[name] = shelf[name]
        elif shelf is not None and (data := _of_another_run(shelf, version)) is not None:
            shelf[name] = packed[name] = data
        else:
            missing.append(version)
    if missing:
        raise BouquetError(
            f"this site lacks {len(missing)} of {len(versions)} pieces of the global model "
            f"({listing(missing)}): it will be sent them in its next round"
        )
    for name in list(shelf or ()):
        if shelf is not None and name.startswith(PIECE) and name not in packed:
            del shelf[name]
    parts = [unpack(packed[PIECE + version]) for version in versions]
    return stack(parts, [1.0] * len(parts)) if parts else None


def _of_another_run(shelf: FolderShelf, version: str) -> bytes | None:
    """The piece of this version from beside this run's shelf; None where it is not there whole."""
    for run in sorted(shelf.folder.parent.glob("*")):
        data = FolderShelf(run).get(PIECE + version)
        if data is not None and _version(data) == version:
            return data
    return None


def _version(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]
