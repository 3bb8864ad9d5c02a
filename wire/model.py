"""The global model as named bytes: how it is saved, and how it travels.

merged.safetensors      what is frozen, where there is any
start.safetensors       what clients go on training from
head.safetensors        what trains beside the factors
state.json              a method's words and whole numbers
state-NAME.safetensors  a method's adapters and arrays, each by its name
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from adapters.adapter import Adapter, Delta, FloatArray
from adapters.head import Head, HeadShapes
from wire.codec import pack, unpack, unpack_delta
from wire.head import pack_head, unpack_head
from wire.rules import BOTH

Value = Adapter | FloatArray | str | int
MERGED, START, HEAD = "merged.safetensors", "start.safetensors", "head.safetensors"
STATE = "state.json"
ARRAY = "values"
"""The one tensor in the file of an array; an adapter's names its modules."""


class Opened(NamedTuple):
    """The parts of a global model, in the order of its fields."""

    merged: Delta | None
    start: Adapter | None
    head: Head | None
    state: Mapping[str, Value]


def pack_model(
    merged: Delta | None,
    start: Adapter | None,
    head: Head | None = None,
    state: Mapping[str, Value] | None = None,
    wire_dtype: str = "float32",
    receives: str = BOTH,
) -> dict[str, bytes]:
    """Name -> bytes of each part that there is; the same model always gives the same bytes.

    wire_dtype: of merged and start; head and state are float32.
    receives: the factors of the start that travel.

    >>> from adapters.adapter import draw
    >>> parts = pack_model(None, draw({"q": (3, 4)}, 2, 7, 1.0), state={"turn": "B"})
    >>> list(parts), unpack_model(parts, {}).state
    (['start.safetensors', 'state.json'], {'turn': 'B'})
    """
    packed: dict[str, bytes] = {}
    if merged is not None:
        packed[MERGED] = pack(merged, wire_dtype)
    if start is not None:
        packed[START] = pack(start, wire_dtype, receives)
    if head is not None:
        packed[HEAD] = pack_head(head)
    words: dict[str, str | int] = {}
    for name, value in sorted((state or {}).items()):
        if isinstance(value, str | int):
            words[name] = value
        elif isinstance(value, Adapter):
            packed[_file(name)] = pack(value)
        else:
            packed[_file(name)] = save({ARRAY: np.ascontiguousarray(value)})
    if words:
        packed[STATE] = json.dumps(words).encode()
    return packed


def unpack_model(parts: Mapping[str, bytes], head_shapes: HeadShapes) -> Opened:
    """The parts of a global model that were packed as they are.

    AdapterError where the head is not of these shapes, or a part is damaged.
    """
    state: dict[str, Value] = dict(json.loads(parts.get(STATE, b"{}")))
    for file, data in parts.items():
        if file.startswith("state-"):
            name = file.removeprefix("state-").removesuffix(".safetensors")
            state[name] = _array(data) if _is_array(data) else unpack(data)
    return Opened(
        unpack_delta(parts[MERGED]) if MERGED in parts else None,
        unpack(parts[START]) if START in parts else None,
        unpack_head(parts[HEAD], head_shapes) if HEAD in parts else None,
        state,
    )


def _file(name: str) -> str:
    return f"state-{name}.safetensors"


def _is_array(data: bytes) -> bool:
    return list(load(data)) == [ARRAY]


def _array(data: bytes) -> FloatArray:
    return np.asarray(load(data)[ARRAY], np.float32)
