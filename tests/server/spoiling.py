"""Ways to spoil an honest reply: in its records, its numbers, its shapes, its header or its bytes.

Each makes a function from the honest content of a reply and the message that it answers to what is
sent instead. They know nothing of the run that they are used in: rank, modules, round and number
format are those of the honest reply.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from adapters.adapter import Adapter, Delta, Dense, Factors
from tests.forged_payloads import framed
from wire.codec import pack, unpack
from wire.records import STYPE, from_record, to_record

Bad: TypeAlias = Callable[[RecordDict, Message], RecordDict | Error]
Json: TypeAlias = Any
Entries: TypeAlias = dict[str, Json]
DEEP = 100_000


def packed_of(honest: RecordDict) -> bytes:
    return from_record(honest["adapter"])


def adapter_of(honest: RecordDict) -> Adapter:
    return unpack(packed_of(honest))


def replaced(honest: RecordDict, **records: Any) -> RecordDict:
    """The honest reply with other records; None leaves one out."""
    content = {**honest, **records}
    return RecordDict({name: record for name, record in content.items() if record is not None})


# What is wrong, by the layer that must notice it. Each of these makes a row's function.


def without(name: str) -> Bad:
    return lambda honest, message: replaced(honest, **{name: None})


def record(name: str, bad: Any) -> Bad:
    return lambda honest, message: replaced(honest, **{name: bad})


def metric(name: str, value: Any) -> Bad:
    def bad(honest: RecordDict, message: Message) -> RecordDict:
        numbers: dict[str, Any] = {**honest["metrics"], name: value}
        return replaced(honest, metrics=MetricRecord(numbers))

    return bad


def lacking_metric(name: str) -> Bad:
    def bad(honest: RecordDict, message: Message) -> RecordDict:
        numbers: Any = {n: v for n, v in honest["metrics"].items() if n != name}
        return replaced(honest, metrics=MetricRecord(numbers))

    return bad


def stamp(**values: Any) -> Bad:
    def bad(honest: RecordDict, message: Message) -> RecordDict:
        return replaced(honest, reply=ConfigRecord({**honest["reply"], **values}))  # type: ignore[dict-item]

    return bad


def another_round(honest: RecordDict, message: Message) -> RecordDict:
    told: Any = honest["reply"]
    return replaced(honest, reply=ConfigRecord({**told, "round": told["round"] - 1}))


def array(**fields: Any) -> Bad:
    """The honest bytes in a Flower array that claims something else."""

    def bad(honest: RecordDict, message: Message) -> RecordDict:
        data = packed_of(honest)
        claims: dict[str, Any] = {"dtype": "uint8", "shape": (len(data),), "stype": STYPE}
        return replaced(
            honest, adapter=ArrayRecord({"packed": Array(data=data, **(claims | fields))})
        )

    return bad


def payload(change: Callable[[bytes], bytes]) -> Bad:
    """Other bytes in the place of the packed adapter."""
    return lambda honest, message: replaced(honest, adapter=to_record(change(packed_of(honest))))


def adapter(change: Callable[[Adapter], Adapter]) -> Bad:
    """An adapter that its own codec packs without complaint."""
    return lambda honest, message: replaced(
        honest, adapter=to_record(pack(change(adapter_of(honest))))
    )


def dense_first(honest: RecordDict, message: Message) -> RecordDict:
    """The delta of the first module as the matrix itself."""
    sent = adapter_of(honest)
    name, factors = next(iter(sent.items()))
    values = np.asarray(factors.scale * (factors.b @ factors.a), np.float32)
    whole = Delta({**sent, name: Dense(values)})
    return replaced(honest, adapter=to_record(pack(whole)))


def first_factors(change: Callable[[Factors], Factors]) -> Bad:
    def bad(x: Adapter) -> Adapter:
        first = next(iter(x))
        return Adapter({**x, first: change(x[first])})

    return adapter(bad)


def header(change: Callable[[Entries, bytes], Any]) -> Bad:
    """A header that lies, under a true hash; `change` edits it and may return other data."""

    def bad(packed: bytes) -> bytes:
        length = 8 + int.from_bytes(packed[:8], "little")
        entries, data = json.loads(packed[8:length]), packed[length:]
        changed = change(entries, data)
        data = changed if isinstance(changed, bytes) else data
        entries["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()
        return framed(json.dumps(entries).encode(), data)

    return payload(bad)


def claim(**fields: Json) -> Bad:
    """The entry of the first tensor says this of itself."""
    return header(lambda entries, data: entries[next(iter(entries))].update(fields))


def scale(value: Json) -> Bad:
    return header(lambda entries, data: entries["__metadata__"].update(scales=json.dumps(value)))


def value(number: float) -> Bad:
    def change(f: Factors) -> Factors:
        a = f.a.copy()
        a[-1, -1] = number
        return Factors(a, f.b, f.scale)

    return first_factors(change)


def of_rank(rank: Callable[[int], int]) -> Callable[[Adapter], Adapter]:
    def change(x: Adapter) -> Adapter:
        return Adapter({name: with_rank(f, rank(f.rank)) for name, f in x.items()})

    return change


def with_rank(f: Factors, rank: int) -> Factors:
    m, n = f.shape
    return Factors(np.resize(f.a, (rank, n)), np.resize(f.b, (m, rank)), f.scale)


def cut(where: Callable[[bytes], int]) -> Bad:
    return payload(lambda packed: packed[: where(packed)])


def header_end(packed: bytes) -> int:
    return 8 + int.from_bytes(packed[:8], "little")


def swapped(f: Factors) -> Factors:
    return Factors(f.b.T, f.a.T, f.scale)


def transposed(entries: Entries, data: bytes) -> None:
    for name, entry in entries.items():
        if name != "__metadata__":
            entry["shape"].reverse()


def broadcastable(*shape: int) -> Bad:
    """The first tensor is one number that would stand for all; its data are cut to fit."""

    def change(entries: Entries, data: bytes) -> bytes:
        first, *others = [name for name in entries if name != "__metadata__"]
        excess = entries[first]["data_offsets"][1] - 4
        entries[first].update(shape=list(shape), data_offsets=[0, 4])
        for name in others:
            entries[name]["data_offsets"] = [at - excess for at in entries[name]["data_offsets"]]
        return data[:4] + data[4 + excess :]

    return header(change)


def all_in(code: str, width: int) -> Bad:
    """Every tensor in another format, its data as long as that takes."""

    def change(entries: Entries, data: bytes) -> bytes:
        at = 0
        for name, entry in entries.items():
            if name != "__metadata__":
                length = width * int(np.prod(entry["shape"]))
                entry.update(dtype=code, data_offsets=[at, at + length])
                at += length
        return bytes(at)

    return header(change)


def shifted(by: int) -> Bad:
    """The second tensor lies elsewhere than behind the first."""

    def change(entries: Entries, data: bytes) -> None:
        second = entries[list(entries)[1]]
        second["data_offsets"] = [at + by for at in second["data_offsets"]]

    return header(change)


def emptied(entries: Entries, data: bytes) -> bytes:
    claims = entries["__metadata__"]
    entries.clear()
    entries["__metadata__"] = claims
    return b""


def inflated_int8(packed: bytes) -> bytes:
    """As many values in int8 as the honest adapter has bytes: four times its size once decoded."""
    count = len(packed) * 9 // 10
    blocks = -(-count // 256)
    data = bytes(count) + np.full(blocks, 0x3F80, "<u2").tobytes()
    entries = {
        "q.lora_A": {"dtype": "I8", "shape": [1, count], "data_offsets": [0, count]},
        "q.lora_A.scales": {
            "dtype": "BF16",
            "shape": [blocks],
            "data_offsets": [count, len(data)],
        },
        "__metadata__": {
            "format": "bouquet-adapter-1",
            "scales": "1.0",
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    }
    return framed(json.dumps(entries).encode(), data)


def huge_header(packed: bytes) -> bytes:
    """All that the budget allows as JSON, which in memory is many times as large."""
    return framed(b'{"a":[' + b"[]," * ((len(packed) - 32) // 3) + b"0]}", b"")


def doubled(name: str) -> Callable[[bytes], bytes]:
    """A header in which one name stands twice; JSON readers differ in which they believe."""

    def change(packed: bytes) -> bytes:
        end = header_end(packed)
        first = json.loads(packed[8:end])[name]
        again = f'{{"{name}":{json.dumps(first)},'.encode()
        return framed(again + packed[9:end].rstrip(), packed[end:])

    return change


def in_place_of(packed: bytes, begin: bytes) -> bytes:
    return begin + packed[len(begin) :]
