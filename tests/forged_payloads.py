"""Byte strings that look like a packed adapter and lie somewhere."""

import hashlib
import json
from typing import Any

import numpy as np

from tests.adapter_generators import make_adapter
from wire.codec import pack

VALID = pack(make_adapter(0, {"q": (4, 2), "v": (3, 5)}, 2, 0.5))
DATA = np.arange(6, dtype="<f4").tobytes()
Json = Any


def entry(shape: Json, begin: Json, end: Json, dtype: Json = "F32") -> dict[str, Json]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A, B = entry([1, 2], 0, 8), entry([4, 1], 8, 24)
PAIR = {"q.lora_A": A, "q.lora_B": B}


def framed(header: bytes, data: bytes = DATA) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def forged(
    entries: Json = PAIR, data: bytes = DATA, scales: Json = '{"q": 0.5}', **metadata: Json
) -> bytes:
    """A payload with a true hash around whatever else is claimed; None leaves a field out."""
    claims = {
        "format": "bouquet-adapter-1",
        "scales": scales,
        "sha256": hashlib.sha256(data).hexdigest(),
        **metadata,
    }
    kept = {key: value for key, value in claims.items() if value is not None}
    return framed(json.dumps({**entries, "__metadata__": kept}).encode(), data)


def with_a(shape: Json = (1, 2), begin: Json = 0, end: Json = 8, dtype: Json = "F32") -> bytes:
    """q.lora_A claims this of itself."""
    return forged({**PAIR, "q.lora_A": entry(shape, begin, end, dtype)})


def without(field: str) -> bytes:
    """The entry of q.lora_A lacks this field."""
    return forged({**PAIR, "q.lora_A": {key: A[key] for key in A if key != field}})


def with_value(pattern: int) -> bytes:
    """One float32 of q.lora_B has this bit pattern."""
    values = np.arange(6, dtype="<f4")
    values.view("<u4")[3] = pattern
    return forged(data=values.tobytes())


def doubled(name: str) -> bytes:
    """The valid payload's header with the entry of `name` written twice."""
    header = forged()[8 : -len(DATA)]
    text = f'"{name}": '.encode()
    value = json.dumps(json.loads(header)[name]).encode()
    return framed(b"{" + text + value + b", " + header[1:])
