"""What is saved comes back bit for bit, and nothing half-written is ever taken for whole."""

import json
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from adapters.adapter import Adapter, Delta, Dense, draw
from adapters.head import head_shapes
from core.errors import BouquetError, UsageError
from journal.state import FORMAT, ServerState, load_state, save_state
from strategies.strategy import GlobalModel
from tests.fake_clients import BASE, SHAPES, trained
from wire.codec import pack
from wire.head import pack_head


def some_adapter(seed: int, rank: int = 3) -> Adapter:
    return trained(draw(SHAPES, rank, seed, 0.7), seed)


def some_state(server_round: int, merged: bool = True, start: bool = True) -> ServerState:
    model = GlobalModel(
        merged=some_adapter(server_round) if merged else None,
        start=some_adapter(server_round + 100, rank=2) if start else None,
    )
    return ServerState(server_round, model, BASE, SHAPES, log_bytes=10 * server_round)


def assert_same(loaded: ServerState | None, saved: ServerState) -> None:
    assert loaded is not None
    assert (loaded.round, loaded.base, loaded.log_bytes) == (saved.round, BASE, saved.log_bytes)
    assert dict(loaded.shapes) == dict(saved.shapes)
    for part in ("merged", "start"):
        one, other = getattr(loaded.model, part), getattr(saved.model, part)
        assert (one is None) == (other is None)
        assert one is None or pack(one) == pack(other)


def test_head_memory_and_data_come_back_too(tmp_path: Path) -> None:
    head = {"score.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}
    model = GlobalModel(head=head, state={"turn": "A", "client-00": 3})
    data = {"oslo": "0123abcd", "bergen": ""}
    save_state(ServerState(4, model, BASE, SHAPES, 0, head_shapes(head), data=data), tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.model.head is not None
    assert pack_head(loaded.model.head) == pack_head(head)
    assert dict(loaded.model.state) == {"turn": "A", "client-00": 3}
    assert dict(loaded.head_shapes) == {"score.weight": (2, 3)}
    assert loaded.data == data


def test_what_a_method_remembers_comes_back_bit_for_bit(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).standard_normal(5).astype(np.float32)
    held = {"momentum": some_adapter(3), "counts": counts, "turn": "B", "rounds": 7}
    save_state(ServerState(2, GlobalModel(state=held), BASE, SHAPES, 0), tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    found = dict(loaded.model.state)
    momentum, values = found.pop("momentum"), found.pop("counts")
    assert isinstance(momentum, Adapter)
    assert pack(momentum) == pack(some_adapter(3))
    assert isinstance(values, np.ndarray)
    assert values.tobytes() == counts.tobytes()
    assert found == {"turn": "B", "rounds": 7}


def test_a_state_of_format_4_is_read(tmp_path: Path) -> None:
    """Words of the method stood in the manifest, as `memory`."""
    state = some_state(3, True, True)
    save_state(state, tmp_path)
    path = tmp_path / "round-0003" / "manifest.json"
    manifest = json.loads(path.read_text())
    memory = {"turn": "A", "client-00": 3}
    path.write_text(json.dumps({**manifest, "format": "bouquet-state-4", "memory": memory}))
    loaded = load_state(tmp_path)
    assert_same(loaded, state)
    assert loaded is not None
    assert dict(loaded.model.state) == memory


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, merged: bool, start: bool) -> None:
    state = some_state(1, merged, start)
    save_state(state, tmp_path)
    assert_same(load_state(tmp_path), state)


def test_a_dense_module_of_merged_comes_back_bit_for_bit(tmp_path: Path) -> None:
    first = next(iter(SHAPES))
    values = np.random.default_rng(3).standard_normal(SHAPES[first]).astype(np.float32)
    merged = Delta({**some_adapter(2), first: Dense(values)})
    state = ServerState(2, GlobalModel(merged=merged), BASE, SHAPES, log_bytes=20)
    save_state(state, tmp_path)
    loaded = load_state(tmp_path)
    assert_same(loaded, state)
    assert loaded is not None
    assert loaded.model.merged is not None
    assert isinstance(loaded.model.merged[first], Dense)


def test_there_is_no_state_before_the_first(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "never made") is None


def test_the_two_newest_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for number in range(5):
        save_state(some_state(number), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0003", "round-0004"]
    assert_same(load_state(tmp_path), some_state(4))


def test_a_half_written_state_is_not_seen(tmp_path: Path) -> None:
    save_state(some_state(1), tmp_path)
    torn = tmp_path / ".writing-round-0002"
    torn.mkdir()
    (torn / "merged.safetensors").write_bytes(b"half")
    assert_same(load_state(tmp_path), some_state(1))
    save_state(some_state(2), tmp_path)
    assert_same(load_state(tmp_path), some_state(2))
    assert not torn.exists()


@pytest.mark.parametrize("name", ["merged.safetensors", "start.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before(
    tmp_path: Path, name: str, damage: str
) -> None:
    save_state(some_state(1), tmp_path)
    save_state(some_state(2), tmp_path)
    path = tmp_path / "round-0002" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data[:-9] if damage == "cut" else data))
    assert_same(load_state(tmp_path), some_state(1))
    save_state(some_state(2), tmp_path)  # the round is played again and takes the damaged place
    assert_same(load_state(tmp_path), some_state(2))


def test_when_no_state_is_whole_the_error_names_each(tmp_path: Path) -> None:
    save_state(some_state(1), tmp_path)
    (tmp_path / "round-0001" / "manifest.json").write_text("{}")
    with pytest.raises(BouquetError, match=r"no saved state in .* is whole: round-0001"):
        load_state(tmp_path)


def test_a_state_of_another_version_is_refused_and_can_still_be_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_state(some_state(1), run / "state")
    manifest = run / "state" / "round-0001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(FORMAT, "bouquet-state-1"))
    with pytest.raises(UsageError, match="cannot be resumed by this one") as caught:
        load_state(run / "state")
    assert f"`bouquet report {run}` draws its rounds" in str(caught.value)
    assert "its state is bouquet-state-1" in str(caught.value)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files makes the kernel refuse the write, as a full disk does."""
    folder = tmp_path / "run" / "state"
    save_state(some_state(1), folder)
    large = {"q": (400, 400)}
    model = GlobalModel(merged=trained(draw(large, 50, 1, 1.0), 1))
    state = ServerState(2, model, BASE, large, log_bytes=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(BouquetError, match=r"state after round 2 could not be saved") as caught:
            save_state(state, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert f"flwr run command again: with resume=true and output={tmp_path / 'run'}" in str(
        caught.value
    )
    assert [path.name for path in folder.iterdir()] == ["round-0001"]
    assert_same(load_state(folder), some_state(1))


def test_a_state_of_another_version_is_refused_with_how_to_read_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "my run" / "state"
    save_state(some_state(1), folder)
    manifest = folder / "round-0001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(FORMAT, "bouquet-state-3"))
    expected = (
        f"{tmp_path / 'my run'} was begun by another version of Bouquet and cannot be resumed by "
        f"this one (its state is bouquet-state-3, expected {FORMAT})"
    )
    with pytest.raises(UsageError, match=re.escape(expected)) as raised:
        load_state(folder)
    assert f"`bouquet report '{tmp_path / 'my run'}'` draws its rounds" in str(raised.value)
