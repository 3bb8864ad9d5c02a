"""The wire form of an adapter: one byte string in safetensors form, read as if from an enemy.

    8 bytes   length of the header, little endian
    header    JSON: tensor name -> dtype, shape, data_offsets; and under __metadata__ the format,
              the scale of every module and the SHA-256 of the data
    data      the tensors, in the order of the header, without gaps

Tensors are named MODULE.lora_A and MODULE.lora_B, so any safetensors reader can open the bytes.
Where the receiver knows one of the two already, only the other travels.
Factors travel in float32, or at half the bytes in bfloat16 or float16; they are held in float32.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.adapter import Adapter, Factors, FloatArray, Shapes
from adapters.errors import AdapterError

FORMAT = "bouquet-adapter-1"
WIRE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
MAX_HEADER_BYTES = 64 << 20
HEADER_BYTES_PER_MODULE = 1024
MAX_DIMENSION = 2**31 - 1


def _to_bfloat16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, as the hardware does: keep the upper half of each float32."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _from_bfloat16(data: bytes) -> FloatArray:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


_ENCODE: dict[str, Callable[[FloatArray], Any]] = {
    "F32": lambda values: values.astype("<f4", copy=False),
    "BF16": _to_bfloat16,
    "F16": lambda values: values.astype("<f2"),
}
_DECODE: dict[str, Callable[[bytes], Any]] = {
    "F32": lambda data: np.frombuffer(data, "<f4").astype(np.float32),
    "BF16": _from_bfloat16,
    "F16": lambda data: np.frombuffer(data, "<f2").astype(np.float32),
}


def pack(adapter: Adapter, dtype: str = "float32", factors: str = "both") -> bytes:
    """Adapter -> bytes. The same adapter always gives the same bytes.

    dtype: float32 (exact), bfloat16 or float16 (half the bytes, rounded to nearest).
    factors: `A`, `B` or `both`: those that travel.
    Raises AdapterError for an unknown dtype, values that it cannot hold, or no module at all.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> unpack(pack(x))["q"].scale
    2.0
    """
    if dtype not in WIRE_DTYPES:
        raise AdapterError(f"wire dtype must be one of {', '.join(WIRE_DTYPES)}; got {dtype!r}")
    if not adapter:
        raise AdapterError("there is no module in this adapter: nothing to send")
    code = WIRE_DTYPES[dtype]
    entries: dict[str, Any] = {}
    chunks: list[bytes] = []
    at = 0
    for name, module in adapter.items():
        for letter, values in (("A", module.a), ("B", module.b)):
            if factors not in (letter, "both"):
                continue
            tensor = f"{name}.lora_{letter}"
            with np.errstate(over="ignore"):
                chunk = _ENCODE[code](np.ascontiguousarray(values)).tobytes()
            # The values too: rounding to bfloat16 can carry a NaN over into a zero.
            if code != "F32" and not (
                np.isfinite(values).all() and np.isfinite(_DECODE[code](chunk)).all()
            ):
                raise AdapterError(
                    f"{tensor} holds values too large for {dtype} or not finite: send float32"
                )
            offsets = [at, at + len(chunk)]
            entries[tensor] = {"dtype": code, "shape": list(values.shape), "data_offsets": offsets}
            chunks.append(chunk)
            at += len(chunk)
    data = b"".join(chunks)
    entries["__metadata__"] = {
        "format": FORMAT,
        "scales": json.dumps({name: module.scale for name, module in adapter.items()}),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def budget_bytes(shapes: Shapes, rank: int, dtype: str = "float32") -> int:
    """The most bytes that an honest adapter of this rank over these modules can take.

    sum r (m + n) values at their width, and room for the header (1 KiB a module).
    """
    values = sum(rank * (m + n) for m, n in shapes.values())
    return values * ITEM_BYTES[WIRE_DTYPES[dtype]] + HEADER_BYTES_PER_MODULE * (len(shapes) + 4)


def unpack(packed: bytes, known: Adapter | None = None) -> Adapter:
    """Bytes -> Adapter, checking everything that the bytes claim before relying on it.

    known: where only one factor of a module travels, the first rows of A or columns of s B of this
    adapter are the other.

    Raises AdapterError, and nothing else, for any input that `pack` did not make: lying lengths,
    gaps, overlaps, unknown dtypes, missing halves, non-finite values, a wrong hash.
    """
    header, data = _split(packed)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise AdapterError(f"expected an adapter in format {FORMAT}; its header names no such one")
    scales = _parse_json(str(metadata.get("scales")), "scales")
    if metadata.get("sha256") != hashlib.sha256(data).hexdigest():
        raise AdapterError("the data does not match the SHA-256 in its header: damaged on the way")
    if not scales:
        raise AdapterError("there is no module in this adapter: its header names no scale")
    tensors = _read_tensors(header, data)
    modules = {}
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise AdapterError(
                f"the scale of module {name!r:.200} must be a number; got {scale!r:.80}"
            )
        a, b = tensors.pop(f"{name}.lora_A", None), tensors.pop(f"{name}.lora_B", None)
        try:
            if a is None or b is None:
                a, b = _completed(
                    a, b, float(scale), known[name] if known and name in known else None
                )
            modules[name] = Factors(a, b, float(scale))
        except (AdapterError, OverflowError) as error:
            raise AdapterError(f"module {name!r:.200}: {error}") from None
    if tensors:
        raise AdapterError(f"tensor {next(iter(tensors))!r:.200} belongs to no module with a scale")
    return Adapter(modules)


def _completed(
    a: FloatArray | None, b: FloatArray | None, scale: float, known: Factors | None
) -> tuple[FloatArray, FloatArray]:
    """Both factors, the one that did not travel taken from `known`."""
    if known is None or (a is None and b is None):
        raise AdapterError("must come with both lora_A and lora_B")
    if b is None:
        assert a is not None
        if not np.isfinite(scale) or scale <= 0.0:
            raise AdapterError(f"its scale must be finite and above zero; got {scale}")
        with np.errstate(over="ignore"):
            return a, known.b[:, : a.shape[0]] * np.float32(known.scale / scale)
    return known.a[: b.shape[1]], b


def _split(packed: bytes) -> tuple[dict[str, Any], bytes]:
    if len(packed) < 8:
        raise AdapterError(f"an adapter takes at least 8 bytes; got {len(packed)}")
    length = int.from_bytes(packed[:8], "little")
    if length > min(len(packed) - 8, MAX_HEADER_BYTES):
        raise AdapterError(
            f"the header claims {length} bytes, but {len(packed) - 8} follow: truncated or not an "
            "adapter"
        )
    return _parse_json(packed[8 : 8 + length], "header"), packed[8 + length :]


def _parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the {what} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise AdapterError(f"the {what} must be a JSON object; got {type(parsed).__name__}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def _read_tensors(header: dict[str, Any], data: bytes) -> dict[str, FloatArray]:
    tensors = {}
    at = 0
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str(code),
                "shape": [int(rows), int(columns)],
                "data_offsets": [int(begin), int(end)],
            } if code in ITEM_BYTES and _are_sizes(rows, columns) and _are_ints(begin, end):
                expected = rows * columns * ITEM_BYTES[code]
            case _:
                raise AdapterError(
                    f"tensor {name!r:.200} must have a dtype of {', '.join(ITEM_BYTES)}, a shape "
                    f"of two sizes up to {MAX_DIMENSION} and two data_offsets; got {entry!r:.200}"
                )
        if begin != at or end != at + expected or end > len(data):
            raise AdapterError(
                f"tensor {name!r:.200} of shape [{rows}, {columns}] should lie at bytes {at} to "
                f"{at + expected} of {len(data)}; its header says {begin} to {end}"
            )
        values = _DECODE[code](data[begin:end]).reshape(rows, columns)
        if not np.isfinite(values).all():
            raise AdapterError(f"tensor {name!r:.200} holds values that are not finite")
        tensors[name] = values
        at = end
    if at != len(data):
        raise AdapterError(f"{len(data) - at} bytes follow the last tensor")
    return tensors


def _are_ints(*numbers: int) -> bool:
    return not any(isinstance(number, bool) for number in numbers)  # JSON's true is an int here


def _are_sizes(*numbers: int) -> bool:
    return _are_ints(*numbers) and all(0 <= number <= MAX_DIMENSION for number in numbers)
