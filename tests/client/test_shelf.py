"""What a site keeps on its disk: whole or not there, and only what its runs still need."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from flwr.app import RecordDict

from adapters.adapter import Delta
from adapters.terms import PLUS
from client.pieces import _version, held_pieces, open_pieces
from client.shelf import FolderShelf, RecordShelf, run_shelf
from core.errors import BouquetError
from tests.adapter_generators import make_adapter
from tests.dense_oracle import dense_deltas, dense_sum, distance
from wire.codec import pack
from wire.messages import Parts
from wire.records import PIECE, to_record


def test_both_shelves_are_mappings_of_names_to_bytes(tmp_path: Path) -> None:
    for shelf in (RecordShelf(RecordDict()), FolderShelf(tmp_path / "shelf")):
        assert list(shelf) == []
        shelf["memory-000002"] = b"two"
        shelf["memory-000001"] = b"one"
        shelf["memory-000002"] = b"second"
        assert {name: shelf[name] for name in shelf} == {
            "memory-000001": b"one",
            "memory-000002": b"second",
        }
        del shelf["memory-000001"]
        assert len(shelf) == 1
        for lost in ("memory-000001", "never"):
            with pytest.raises(KeyError):
                shelf[lost]
            with pytest.raises(KeyError):
                del shelf[lost]


def test_a_damaged_file_is_not_there(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path)
    shelf["piece-a"] = b"x" * 100
    file = tmp_path / "piece-a"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(bytes(data))
    assert shelf.get("piece-a") is None
    file.write_bytes(b"short")
    assert "piece-a" not in shelf


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "UPPER", "a" + chr(0)])
def test_a_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(BouquetError, match="letters, digits and -"):
        FolderShelf(tmp_path)[name] = b""


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BouquetError, match="cache-path cannot be written"):
        FolderShelf(tmp_path / "file")["piece-a"] = b""


def test_the_four_newest_runs_stay(tmp_path: Path) -> None:
    for number in range(6):
        folder = run_shelf(tmp_path, f"run{number}").folder
        os.utime(folder, (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run2", "run3", "run4", "run5"]


ADAPTERS = [make_adapter(seed, {"q": (4, 6)}, 2) for seed in range(3)]
PACKED = [pack(adapter) for adapter in ADAPTERS]
VERSIONS = [_version(data) for data in PACKED]


def sum_of_pieces(
    content: RecordDict, versions: Sequence[str], shelf: FolderShelf | None
) -> Delta | None:
    """All of them added; without a start."""
    return open_pieces(content, Parts(tuple(versions), (PLUS,) * len(versions)), shelf)[0]


def message(*which: int) -> RecordDict:
    return RecordDict({PIECE + VERSIONS[k]: to_record(PACKED[k]) for k in which})


def test_pieces_that_came_and_pieces_that_are_there_make_the_same_bytes(tmp_path: Path) -> None:
    shelf = run_shelf(tmp_path, "run")
    first = sum_of_pieces(message(0, 1), VERSIONS[:2], shelf)
    assert held_pieces(tmp_path) == sorted(VERSIONS[:2])
    grown = sum_of_pieces(message(2), VERSIONS, shelf)
    whole = sum_of_pieces(message(0, 1, 2), VERSIONS, None)
    assert first is not None
    assert grown is not None
    assert whole is not None
    assert pack(grown) == pack(whole)
    assert distance(dense_deltas(grown), dense_sum(ADAPTERS, [1.0] * 3)) < 1e-5


def test_what_the_run_no_longer_needs_goes(tmp_path: Path) -> None:
    shelf = run_shelf(tmp_path, "run")
    shelf["memory-000001"] = b"stays"
    sum_of_pieces(message(0, 1), VERSIONS[:2], shelf)
    sum_of_pieces(message(2), VERSIONS[2:], shelf)
    assert list(shelf) == ["memory-000001", PIECE + VERSIONS[2]]


def test_no_pieces_are_no_merged() -> None:
    assert sum_of_pieces(RecordDict(), [], None) is None


def test_a_piece_that_is_nowhere_is_named(tmp_path: Path) -> None:
    shelf = run_shelf(tmp_path, "run")
    sum_of_pieces(message(0), VERSIONS[:1], shelf)
    with pytest.raises(BouquetError, match=f"lacks 1 of 2 pieces.*{VERSIONS[1]}"):
        sum_of_pieces(message(), VERSIONS[:2], shelf)
    with pytest.raises(BouquetError, match="lacks 2 of 2 pieces"):
        sum_of_pieces(message(), VERSIONS[:2], None)


def test_a_piece_that_only_another_run_has_is_there_too(tmp_path: Path) -> None:
    sum_of_pieces(message(0, 1), VERSIONS[:2], run_shelf(tmp_path, "run"))
    again = run_shelf(tmp_path, "again")
    assert held_pieces(tmp_path) == sorted(VERSIONS[:2])
    found = sum_of_pieces(message(2), VERSIONS, again)
    whole = sum_of_pieces(message(0, 1, 2), VERSIONS, None)
    assert found is not None
    assert whole is not None
    assert pack(found) == pack(whole)
    assert list(again) == sorted(PIECE + version for version in VERSIONS)


def test_a_piece_that_is_not_what_its_version_says_is_refused(tmp_path: Path) -> None:
    forged = RecordDict({PIECE + VERSIONS[0]: to_record(PACKED[1])})
    with pytest.raises(BouquetError, match="does not match its version"):
        sum_of_pieces(forged, VERSIONS[:1], run_shelf(tmp_path, "run"))
