"""Merged in pieces: only what is new travels, and everybody has the same bits."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from adapters.adapter import Delta
from adapters.algebra import add as added
from adapters.refactoring import compact
from adapters.terms import PLUS, Term
from client.pieces import held_pieces
from journal.run_folder import RunFolder
from journal.state import ServerState, load_state
from server.pieces import MOST_TIMES_ITS_SIZE, in_pieces
from server.rounds import run_rounds
from settings.keys import Value
from settings.site import client_name
from simulations.holdings import Holdings
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import GlobalModel
from tests.adapter_generators import make_adapter
from tests.dense_oracle import add, dense_deltas, distance, frobenius
from tests.fake_clients import SHAPES, fake_app, fake_grid, settings_of
from wire.codec import pack, unpack_delta
from wire.pieces import Piece, piece_of, sum_of

Seen = dict[tuple[int, int], Delta | None]


class Federation:
    """Three fake clients that keep what they received, and what each had in each round."""

    def __init__(self, folder: Path, **values: Value) -> None:
        self.settings = settings_of(folder / "run", rounds=4, **values)
        self.cache = folder / "caches"
        self.seen: Seen = {}

    def play(self, tamper: Any = lambda client, message, reply: reply, **values: Value) -> None:
        app = fake_app(tamper=tamper, cache=self.cache, saw=self._saw)
        settings = settings_of(self.settings.output, rounds=4, **values)
        run_rounds(fake_grid(settings, app), settings)

    def _saw(self, client: int, server_round: int, merged: Delta | None) -> None:
        self.seen[client, server_round] = merged

    @property
    def state(self) -> ServerState:
        state = load_state(Path(self.settings.output) / "state")
        assert state is not None
        return state

    @property
    def records(self) -> list[Any]:
        return RunFolder(Path(self.settings.output)).rounds()


def bits(federation: Federation) -> dict[str, bytes]:
    newest = max((Path(federation.settings.output) / "state").glob("round-*"))
    return {path.name: path.read_bytes() for path in sorted(newest.glob("*.safetensors"))}


POLICIES: list[Value] = ["random", "keep-a", "increment", "global"]


@pytest.mark.parametrize("policy", POLICIES)
def test_all_have_the_same_bits_and_the_sum_of_the_pieces_is_exact(
    policy: Value, tmp_path: Path
) -> None:
    kept = Federation(tmp_path / "kept")
    kept.play(start__policy=policy)
    assert kept.state.pieces is not None
    for record in kept.records[1:]:  # the sum of the pieces is what the method made, and exact
        assert record["aggregation_noise"] < 1e-5
    for server_round in (2, 3, 4):
        ours = [kept.seen[client, server_round] for client in range(3)]
        assert all(one is not None and pack(one) == pack(ours[0]) for one in ours)  # type: ignore


METHODS: list[dict[str, Value]] = [
    {"strategy__name": name}
    if make_strategy(name).properties.mixed_ranks
    else {"strategy__name": name, "lora__rank": "2"}
    for name in STRATEGIES
]


@pytest.mark.parametrize("values", METHODS, ids=lambda v: v["strategy__name"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_nothing_but_the_bytes_depends_on_who_holds_what(
    values: dict[str, Value], wire: Value, tmp_path: Path
) -> None:
    """Sites with a disk, simulated clients, and clients that keep nothing at all."""
    values = {"rounds": 5, "wire__dtype": wire, "clients__fraction": 0.6, **values}

    class NoDisk(Holdings):
        def held(self, client: str) -> list[str]:
            return []

    found, down = [], []
    for name in ("disks", "simulated", "forgetful"):
        settings = settings_of(tmp_path / name, **values)
        caches = tmp_path / "caches" if name == "disks" else None
        grid = fake_grid(settings, fake_app(cache=caches))
        if name == "forgetful":
            grid._holdings = NoDisk()
        folder = run_rounds(grid, settings)
        newest = max((folder / "state").glob("round-*"))
        found.append({p.name: p.read_bytes() for p in sorted(newest.glob("*.safetensors"))})
        down.append([record["bytes_down"] for record in RunFolder(folder).rounds()[1:]])
    assert found[0] == found[1] == found[2]
    assert down[0] == down[1]
    assert all(few <= many for few, many in zip(down[1], down[2], strict=True))


@pytest.mark.parametrize("name", ["flora", "flora-warm", "fedex-lora", "frlora", "florist"])
def test_a_client_that_was_not_sampled_is_sent_later_what_it_lacks(
    name: str, tmp_path: Path
) -> None:
    values: dict[str, Value] = {"strategy__name": name, "lora__rank": "1", "rounds": 6}
    settings = settings_of(tmp_path / "run", clients__fraction=0.6, **values)
    folder = run_rounds(fake_grid(settings), settings)
    records = RunFolder(folder).rounds()[1:]
    last = {client["client"]: 0 for record in records for client in record["clients"]}
    more = 0
    for record in records[1:]:
        present = [client["client"] for client in record["clients"]]
        absent = {c: record["round"] - 1 - last[c] for c in present}
        sizes = {client["client"]: client["bytes_down"] for client in record["clients"]}
        for one, other in itertools.permutations(present, 2):
            if absent[one] > absent[other]:
                assert sizes[one] >= sizes[other]
                more += sizes[one] > sizes[other]
        last |= dict.fromkeys(present, record["round"])
    assert more > 0


def test_a_round_sends_only_what_is_new_and_the_log_says_so(tmp_path: Path) -> None:
    kept = Federation(tmp_path, start__policy="random")
    kept.play(start__policy="random")
    assert kept.records[1]["bytes_down"] == 0
    sizes = [record["clients"][0]["bytes_down"] for record in kept.records[2:]]
    pieces = kept.state.pieces
    assert pieces is not None
    first = len(pieces[0].packed)
    assert sizes[0] > 0
    for record in kept.records[2:]:
        assert record["bytes_down"] == 3 * record["clients"][0]["bytes_down"]
    assert sizes[-1] < first + sum(len(piece.packed) for piece in pieces)
    assert held_pieces(kept.cache / client_name(0)) == sorted(
        piece.version for piece in _sent_last(kept)
    )


def _sent_last(federation: Federation) -> list[Piece]:
    """The pieces of the state before the newest: those that the last round needed."""
    older = sorted((Path(federation.settings.output) / "state").glob("round-*"))[0]
    files = sorted(older.glob("piece-*.safetensors"))
    return [piece_of(unpack_delta(file.read_bytes()), "float32") for file in files]


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_run_that_was_killed_ends_with_the_same_bits(stop_after: int, tmp_path: Path) -> None:
    whole, torn = Federation(tmp_path / "whole"), Federation(tmp_path / "torn")
    whole.play()

    def crash(client: int, message: Message, reply: Message) -> Message:
        if message.metadata.group_id == str(stop_after + 1) and client == 1:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        torn.play(crash)
    torn.play(resume=True)
    assert bits(torn) == bits(whole)


def test_who_joins_late_or_lost_its_disk_between_two_runs_has_the_same_bits(
    tmp_path: Path,
) -> None:
    whole, torn = Federation(tmp_path / "whole"), Federation(tmp_path / "torn")
    whole.play()
    torn_settings: dict[str, Value] = {"rounds": 2}
    app = fake_app(cache=torn.cache)
    half = settings_of(torn.settings.output, **torn_settings)
    run_rounds(fake_grid(half, app), half)
    shutil.rmtree(torn.cache / client_name(1))
    torn.play(resume=True)
    assert bits(torn) == bits(whole)


def test_the_same_run_once_more_under_another_name_has_the_same_bits(tmp_path: Path) -> None:
    first = Federation(tmp_path)
    first.play()
    again = Federation(tmp_path)
    again.settings = settings_of(tmp_path / "again", rounds=4)
    again.play()
    assert [record.get("failures", []) for record in again.records] == [[]] * 5
    assert bits(again) == bits(first)


def test_a_site_that_lost_what_it_said_it_has_is_named_and_sent_everything_next(
    tmp_path: Path,
) -> None:
    kept = Federation(tmp_path)

    def lose(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and message.metadata.group_id == "2":
            shutil.rmtree(kept.cache / client_name(1))
        return reply

    kept.play(lose)
    third, fourth = kept.records[3:5]
    (failure,) = third["failures"]
    assert failure["client"] == "client-01"
    assert "this site lacks" in failure["reason"]
    assert fourth["failures"] == []
    assert "client-01" in [client["client"] for client in fourth["clients"]]


def model(merged: Delta) -> GlobalModel:
    return GlobalModel(merged=merged)


def gain(added: Delta) -> tuple[Term]:
    return (Term(PLUS, added),)


def test_what_the_method_does_not_tell_apart_travels_whole() -> None:
    old, new = (make_adapter(seed, SHAPES, 3, 1.0) for seed in (1, 2))
    pieces, merged = in_pieces((), GlobalModel(), model(old), "float32")
    again, same = in_pieces(pieces, model(merged), model(merged), "float32")  # type: ignore
    assert again == pieces
    assert same is merged
    (piece,), whole = in_pieces(pieces, model(merged), model(new), "float32")  # type: ignore
    assert pack(piece.delta) == pack(new)
    assert whole is not None
    assert distance(dense_deltas(whole), dense_deltas(new)) <= 1e-6 * frobenius(dense_deltas(new))
    assert in_pieces(pieces, model(old), GlobalModel(), "float32") == ((), None)


def test_pieces_that_outgrow_merged_are_written_anew() -> None:
    rng = np.random.default_rng(0)
    pieces: tuple[Piece, ...] = ()
    before, counts = GlobalModel(), []
    total = None
    for seed in range(12):
        step = make_adapter(int(rng.integers(1000)) + seed, SHAPES, 2, 1.0)
        dense = dense_deltas(step)
        total = dense if total is None else add(total, dense)
        parts = [step] if before.merged is None else [before.merged, step]
        merged = compact(added(parts, [1.0] * len(parts)))
        after = model(merged)
        pieces, held = in_pieces(pieces, before, after, "float32", gain(step))
        assert held is not None
        assert distance(dense_deltas(held), total) <= 2e-6 * frobenius(total)
        values = sum(piece.delta.num_parameters for piece in pieces)
        assert values <= MOST_TIMES_ITS_SIZE * merged.num_parameters
        counts.append(len(pieces))
        before = GlobalModel(merged=sum_of(pieces))
    assert max(counts) > 1
    assert any(later < earlier for earlier, later in itertools.pairwise(counts))


def test_a_piece_is_named_by_what_travels() -> None:
    adapter = make_adapter(1, SHAPES, 3, 1.0)
    assert piece_of(adapter, "float32").version != piece_of(adapter, "bfloat16").version
    assert piece_of(adapter, "float32").version == piece_of(adapter, "float32").version
