"""The server's state is a value; saving it after each round is the checkpoint.

    state/round-0003/manifest.json        round, base, shapes, length of rounds.jsonl, hashes
    state/round-0003/merged.safetensors   where there is one
    state/round-0003/start.safetensors    where there is one
    state/round-0003/head.safetensors     where there is one
    state/round-0003/state.json, state-NAME.safetensors    what the method remembers
    state/round-0003/piece-000.safetensors ...    instead of merged, where it travels in pieces

A state is written under a temporary name, flushed to the disk and then renamed, so that a folder
with a round's name is always whole. The two newest are kept.
"""

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters.head import HeadShapes
from core.errors import AdapterError, BouquetError, UsageError
from core.files import flush_folder, write_durably
from journal.going_on import how_to_go_on
from strategies.strategy import GlobalModel
from wire.codec import pack, unpack_delta
from wire.model import pack_model, unpack_model
from wire.pieces import Piece, piece_of, sum_of

FORMAT = "bouquet-state-5"
READABLE = ("bouquet-state-4", FORMAT)
"""Format 4 holds the method's words as `memory`, and no arrays of it."""
KEPT = 2


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything that the next round depends on, apart from the configuration."""

    round: int
    model: GlobalModel
    base: str
    shapes: Mapping[str, tuple[int, int]]
    log_bytes: int
    """Length of rounds.jsonl when this state was saved; what follows belongs to a torn round."""
    head_shapes: HeadShapes = field(default_factory=dict)
    pieces: tuple[Piece, ...] | None = None
    """What model.merged is the sum of, where it travels in pieces."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Client -> hash of the data that it began the run with."""
    labels: tuple[str, ...] | None = None
    """Of a classifier, as the run's first members agreed; None: saved by an older version."""
    template: str | None = None
    """Hash of the file with the chat template, likewise."""


def save_state(state: ServerState, folder: Path) -> None:
    """Write the state below `folder`, all or nothing.

    Raises BouquetError where the disk will not take it; what was saved before is untouched.
    """
    target = folder / f"round-{state.round:04d}"
    scratch = folder / f".writing-{target.name}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        hashes = {}
        for name, data in _packed(state).items():
            hashes[name] = hashlib.sha256(data).hexdigest()
            write_durably(scratch / name, data)
        manifest = {
            "format": FORMAT,
            "round": state.round,
            "base": state.base,
            "shapes": {name: list(shape) for name, shape in state.shapes.items()},
            "head_shapes": {name: list(shape) for name, shape in state.head_shapes.items()},
            "data": dict(state.data),
            "labels": state.labels,
            "template": state.template,
            "pieces": None if state.pieces is None else [piece.kind for piece in state.pieces],
            "log_bytes": state.log_bytes,
            "files": hashes,
        }
        write_durably(scratch / "manifest.json", json.dumps(manifest, indent=1).encode())
        if target.exists():  # a damaged one that loading passed over
            shutil.rmtree(target)
        scratch.rename(target)
        flush_folder(folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise BouquetError(
            f"the state after round {state.round} could not be saved in {folder}: "
            f"{error.strerror or error}. The run is whole up to the round before; free some "
            f"space, then {how_to_go_on(folder.parent)}"
        ) from error
    for old in sorted(folder.glob("round-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _packed(state: ServerState) -> dict[str, bytes]:
    model, pieces = state.model, state.pieces or ()
    merged = model.merged if state.pieces is None else None
    return {
        **pack_model(merged, model.start, model.head, model.state),
        **{f"piece-{k:03d}.safetensors": pack(piece.delta) for k, piece in enumerate(pieces)},
    }


def load_state(folder: Path, wire_dtype: str = "float32") -> ServerState | None:
    """The newest whole state below `folder`; None where there is none yet.

    wire_dtype: the number format in which pieces of merged travel.
    A damaged one (a hash that does not match) is passed over for the one before it. Raises
    BouquetError when there are states and none is whole, UsageError when they are of another
    version.
    """
    check_format(folder)
    damage = []
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            return _read_state(path, wire_dtype)
        except (OSError, ValueError, KeyError, TypeError, AdapterError) as error:
            damage.append(f"{path.name}: {error}")
    if damage:
        raise BouquetError(f"no saved state in {folder} is whole: {'; '.join(damage)}")
    return None


def check_format(folder: Path) -> None:
    """UsageError where the newest state below `folder` was written by another version."""
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            found = json.loads((path / "manifest.json").read_bytes())["format"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found not in READABLE:
            run = folder.parent
            raise UsageError(
                f"{run} was begun by another version of Bouquet and cannot be resumed by this one "
                f"(its state is {found}, expected {FORMAT}): go on with the version that its "
                "config.toml names, or begin a new run. What it holds can be read: "
                f"`{shlex.join(['bouquet', 'report', str(run)])}` draws its rounds, and "
                f"{run / 'adapter'}, where it is finished, loads with PEFT"
            )
        return


def _read_state(path: Path, wire_dtype: str) -> ServerState:
    manifest = json.loads((path / "manifest.json").read_bytes())
    if manifest["format"] not in READABLE:
        raise ValueError(f"expected format {FORMAT}, got {manifest['format']!r}")
    parts = {}
    for name, wanted in manifest["files"].items():
        data = (path / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != wanted:
            raise ValueError(f"{name} does not match its hash")
        parts[name] = data
    head_shapes = {name: tuple(shape) for name, shape in manifest["head_shapes"].items()}
    merged, start, head, held = unpack_model(parts, head_shapes)
    pieces = None
    if manifest["pieces"] is not None:
        names = sorted(name for name in parts if name.startswith("piece-"))
        pieces = tuple(
            piece_of(unpack_delta(parts[name]), wire_dtype, kind)
            for name, kind in zip(names, manifest["pieces"], strict=True)
        )
        merged = sum_of(pieces, start)
    return ServerState(
        round=manifest["round"],
        model=GlobalModel(merged, start, head, {**manifest.get("memory", {}), **held}),
        base=manifest["base"],
        shapes={name: (m, n) for name, (m, n) in manifest["shapes"].items()},
        log_bytes=manifest["log_bytes"],
        head_shapes=head_shapes,
        pieces=pieces,
        data=manifest["data"],
        labels=None if manifest.get("labels") is None else tuple(manifest["labels"]),
        template=manifest.get("template"),
    )
