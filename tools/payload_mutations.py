"""Honest payloads, and ways to damage them: bits, bytes, the header as JSON, the data.

All are functions of a random.Random, so that a case can be played again from its seed.
"""

import hashlib
import json
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.number_formats import WIRE_DTYPES
from wire.codec import pack
from wire.head import pack_head

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 300), "q": (2, 2)}
HEAD_SHAPES: dict[str, tuple[int, ...]] = {"score.weight": (3, 4), "score.bias": (3,)}
TRUE_HASH = 0.8
INTEGERS = (0, 1, -1, 2, 7, 255, 256, 257, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1)
WORDS = ("", "F32", "BF16", "F16", "I8", "F64", "U8", "BOOL", "q", "lora_A", "nan", "\ud800", "\0")
FLOATS = (0.0, -0.0, 0.5, -1.0, 1e-45, 1e30, 1e300, float("nan"), float("inf"), -float("inf"))
PATTERNS = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x7F800001)

Mutation = Callable[[random.Random, bytes], bytes]


def honest_adapter(rng: random.Random) -> Adapter:
    """One to three modules of ranks 0 to 3, their scales alike or not."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    scales = [rng.choice((0.5, 2.0))] * 3 if rng.random() < 0.5 else [0.5, 1.0, 2.0]
    modules: dict[str, Factors] = {}
    for scale, (name, (m, n)) in zip(scales, rng.sample(sorted(SHAPES.items()), 3), strict=True):
        if modules and rng.random() < 0.3:
            continue
        rank = rng.choice((0, 1, 2, 2, 3))
        a, b = (numbers.standard_normal(shape, np.float32) for shape in ((rank, n), (m, rank)))
        modules[name] = Factors(a, b, scale)
    return Adapter(modules)


def honest_payload(rng: random.Random) -> bytes:
    """A packed adapter in any format."""
    factors = rng.choice(("both", "both", "A", "B"))
    return pack(honest_adapter(rng), rng.choice(list(WIRE_DTYPES)), factors)


def honest_head(rng: random.Random) -> bytes:
    """A packed head."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    return pack_head(
        {name: numbers.standard_normal(s, np.float32) for name, s in HEAD_SHAPES.items()}
    )


def split(payload: bytes) -> tuple[bytes, bytes]:
    """Header and data, as far as the length can be believed."""
    end = 8 + min(int.from_bytes(payload[:8], "little"), len(payload))
    return payload[8:end], payload[end:]


def framed(header: bytes, data: bytes) -> bytes:
    """A payload whose length is that of its header."""
    return len(header).to_bytes(8, "little") + header + data


def flip_bits(rng: random.Random, payload: bytes) -> bytes:
    """One to eight bits, anywhere."""
    changed = bytearray(payload)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, payload: bytes) -> bytes:
    """A few bytes, random or such as mean something."""
    at = rng.randrange(len(payload) + 1)
    new = rng.choice((rng.randbytes(rng.randrange(1, 9)), b"\xff" * 8, b"\0" * 8, b"{", b'"', b"["))
    return payload[:at] + new + payload[at + len(new) :]


def insert(rng: random.Random, payload: bytes) -> bytes:
    """Random bytes in between."""
    at = rng.randrange(len(payload) + 1)
    return payload[:at] + rng.randbytes(rng.randrange(1, 33)) + payload[at:]


def cut_out(rng: random.Random, payload: bytes) -> bytes:
    """Bytes that are missing in between."""
    at, length = rng.randrange(len(payload) + 1), rng.randrange(1, 65)
    return payload[:at] + payload[at + length :]


def truncate(rng: random.Random, payload: bytes) -> bytes:
    """An end that is missing."""
    return payload[: rng.randrange(len(payload) + 1)]


def splice(rng: random.Random, payload: bytes) -> bytes:
    """The beginning of one payload and the end of another."""
    other = honest_payload(rng)
    return payload[: rng.randrange(len(payload) + 1)] + other[rng.randrange(len(other) + 1) :]


def change_length(rng: random.Random, payload: bytes) -> bytes:
    """Another length of the header."""
    length = int.from_bytes(payload[:8], "little") + rng.choice((-9, -8, -1, 1, 8, 64))
    claimed = rng.choice((length, *INTEGERS)) % 2**64
    return claimed.to_bytes(8, "little") + payload[8:]


def change_header_text(rng: random.Random, payload: bytes) -> bytes:
    """Bytes of the header, whose length stays true."""
    header, data = split(payload)
    change = rng.choice((flip_bits, overwrite, insert, cut_out, truncate))
    return framed(change(rng, header), data)


def change_data(rng: random.Random, payload: bytes) -> bytes:
    """The data alone: one bad number, or bytes."""
    header, data = split(payload)
    if rng.random() < 0.5:
        at = 4 * rng.randrange(len(data) // 4 + 1)
        pattern = rng.choice(PATTERNS).to_bytes(4, "little")
        data = data[:at] + pattern + data[at + 4 :]
    else:
        data = rng.choice((flip_bits, overwrite, insert, cut_out, truncate))(rng, data)
    return framed(header, data)


def change_json(rng: random.Random, payload: bytes) -> bytes:
    """One value of the header, wherever it lies: replaced, moved, dropped or doubled."""
    header, data = split(payload)
    try:
        tree = json.loads(header)
    except (ValueError, RecursionError):
        return payload
    place, key = random_place(rng, tree)
    if place is None:
        return framed(json.dumps(any_json(rng, 3)).encode(), data)
    match rng.randrange(6):
        case 0 | 1:
            place[key] = any_json(rng, 2)
        case 2:
            place[key] = near(rng, place[key])
        case 3:
            del place[key]
        case 4:
            other, at = random_place(rng, tree)
            if other is not None:
                place[key] = json.loads(json.dumps(other[at]))
        case _:
            if isinstance(place, dict):
                place[rng.choice((*WORDS, f"{key}.scales", f"{key}x", key[:-1]))] = place[key]
                if rng.random() < 0.5:
                    del place[key]
            else:
                place.append(place[key])
    header = json.dumps(tree).encode()
    if rng.random() < 0.05:
        header = header[:-1] + b", " + header[1:]  # every name twice
    return framed(header, data)


def random_place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A container of the tree and a key in it; None where there is none."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree] if isinstance(tree, dict | list) else []
    while waiting and len(places) < 500:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return rng.choice(places) if places else (None, None)


def any_json(rng: random.Random, depth: int) -> Any:
    """Any JSON value, with a liking for those that break decoders."""
    match rng.randrange(8 if depth else 6):
        case 0:
            return rng.choice(INTEGERS) * rng.choice((1, 1, -1))
        case 1:
            return rng.choice(FLOATS)
        case 2:
            return rng.choice(WORDS) + rng.choice(("", "", ".lora_A", ".lora_B", ".lora_A.scales"))
        case 3:
            return rng.choice((None, True, False))
        case 4:
            return rng.randrange(-3, 70)
        case 5:
            return json.dumps(any_json(rng, 1))
        case 6:
            return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice(WORDS): any_json(rng, depth - 1) for _ in range(rng.randrange(4))}


def near(rng: random.Random, value: Any) -> Any:
    """A value of the same kind, a little off."""
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1))
    if isinstance(value, int):
        return value + rng.choice((-256, -8, -4, -2, -1, 1, 2, 4, 8, 256))
    if isinstance(value, float):
        return value * rng.choice((-1.0, 0.0, 1e10, 1e-10, 1e308))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "A", value.upper(), value.replace("A", "B"), "I8"))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:-1], value + value[-1:], [value]))
    return {f"{key}"[1:]: entry for key, entry in value.items()}


def nest(rng: random.Random, payload: bytes) -> bytes:
    """Arrays or objects inside one another, near the parser's limit or far beyond it."""
    header, data = split(payload)
    depth = rng.choice((10, 200, 900, 990, 1000, 5000))
    deep = rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    at = rng.randrange(len(header) + 1)
    return framed(rng.choice((deep, header[:at] + deep + header[at:])), data)


MUTATIONS: tuple[Mutation, ...] = (
    *(change_json,) * 16,
    *(change_data,) * 4,
    *(change_header_text,) * 2,
    change_length,
    flip_bits,
    overwrite,
    insert,
    cut_out,
    truncate,
    splice,
    nest,
)


def with_true_hash(payload: bytes) -> bytes:
    """The SHA-256 of the data as it is now, in a header that can be read."""
    header, data = split(payload)
    try:
        tree = json.loads(header)
        tree["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
    except (ValueError, RecursionError, KeyError, TypeError):
        return payload
    return framed(json.dumps(tree).encode(), data)


def damaged(rng: random.Random, payload: bytes) -> bytes:
    """One to four mutations, and in most cases a true hash."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        with suppress(RecursionError):  # of the mutation itself, where JSON lies deep already
            payload = rng.choice(MUTATIONS)(rng, payload)
    return with_true_hash(payload) if rng.random() < TRUE_HASH else payload
