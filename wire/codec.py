"""The wire form of an adapter: one byte string in safetensors form, read as if from an enemy.

The bytes are a safetensors file (wire/framing.py), with tensors named MODULE.lora_A and
MODULE.lora_B, so that any safetensors reader can open them. What the server adds to the base may be
dense in some modules: each is then one tensor, MODULE.delta. A client's adapter never is. Under
__metadata__ its header holds the format, the SHA-256 of the data and the scales: one number where
all modules share it, else one for each by name. Where the receiver knows one of the two factors
already, only the other travels.

Factors are held in float32. They travel as they are or rounded to bfloat16, float16 or int8
(adapters/number_formats.py); one in int8 is followed by the scales of its blocks, a vector in
bfloat16 named MODULE.lora_A.scales.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.adapter import Adapter, Delta, Dense, Factors, FloatArray, Form, Shapes, largest
from adapters.number_formats import (
    ITEM_BYTES,
    SCALE_CODE,
    WIRE_DTYPES,
    Layout,
    decode,
    encode,
    encoded_bytes,
    num_blocks,
)
from core.errors import AdapterError
from wire.framing import (
    MAX_DIMENSION,
    MAX_HEADER_BYTES,
    claimed,
    frame,
    parse_json,
    split,
    tensor_bytes,
)

FORMAT = "bouquet-adapter-1"
HEADER_BYTES_PER_MODULE = 1024
LAYOUTS: dict[str, Layout] = {"A": "C", "B": "F"}
"""How factors are held; those of each direction lie together."""
DENSE = ".delta"
SCALES = ".scales"


@dataclass(frozen=True)
class Limits:
    """The most that an adapter may hold; more is refused before it is read or made."""

    header_bytes: int = MAX_HEADER_BYTES
    values: float = math.inf
    """Of all factors that travel, whatever the format: each takes four bytes once it is here."""
    factors: str = "both"
    """Those that may travel: `A`, `B` or `both`."""


def limits_of(shapes: Shapes, rank: int, factors: str = "both") -> Limits:
    """What these factors of an adapter of at most this rank over these modules stay within.

    >>> limits_of({"q": (3, 5)}, rank=2)
    Limits(header_bytes=5120, values=16, factors='both')
    """
    sizes = {"A": sum(n for _, n in shapes.values()), "B": sum(m for m, _ in shapes.values())}
    values = rank * sum(size for letter, size in sizes.items() if factors in (letter, "both"))
    return Limits(HEADER_BYTES_PER_MODULE * (len(shapes) + 4), values, factors)


def pack(delta: Delta, dtype: str = "float32", factors: str = "both") -> bytes:
    """Delta, such as an adapter -> bytes. The same delta always gives the same bytes.

    dtype: float32 (exact), bfloat16 or float16 (half the bytes), int8 (about a quarter); rounded
    to nearest.
    factors: `A`, `B` or `both`: those that travel. A dense module travels whole.
    Raises AdapterError for an unknown dtype, values that it cannot hold, or no module at all.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> unpack(pack(x))["q"].scale
    2.0
    """
    if dtype not in WIRE_DTYPES:
        raise AdapterError(f"wire dtype must be one of {', '.join(WIRE_DTYPES)}; got {dtype!r}")
    if not delta:
        raise AdapterError("there is no module in this adapter: nothing to send")
    code = WIRE_DTYPES[dtype]
    entries: dict[str, Any] = {}
    chunks: list[bytes] = []
    at = 0

    def add(tensor: str, code: str, shape: list[int], chunk: bytes) -> None:
        nonlocal at
        offsets = [at, at + len(chunk)]
        entries[tensor] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        chunks.append(chunk)
        at += len(chunk)

    for name, form in delta.items():
        for tensor, values, layout in _tensors(name, form, factors):
            chunk, scales = _encoded(values, dtype, layout, tensor)
            add(tensor, code, list(values.shape), chunk)
            if code == "I8":
                add(tensor + SCALES, SCALE_CODE, [num_blocks(values.size)], scales)
    data = b"".join(chunks)
    entries["__metadata__"] = {
        "format": FORMAT,
        "scales": _written_scales(delta),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return frame(entries, data)


def _tensors(name: str, form: Form, factors: str) -> Iterator[tuple[str, FloatArray, Layout]]:
    """The tensors of a module that travel, by name, and how each is held."""
    if isinstance(form, Dense):
        yield name + DENSE, form.values, "C"
        return
    for letter, values in (("A", form.a), ("B", form.b)):
        if factors in (letter, "both"):
            yield f"{name}.lora_{letter}", values, LAYOUTS[letter]


def _written_scales(delta: Delta) -> str:
    """One number where it is that of all modules, which is most of the time; else by name."""
    scales = {n: 1.0 if isinstance(form, Dense) else form.scale for n, form in delta.items()}
    shared = {json.dumps(scale) for scale in scales.values()}
    return shared.pop() if len(shared) == 1 else json.dumps(scales)


def _encoded(values: FloatArray, dtype: str, layout: Layout, tensor: str) -> tuple[bytes, bytes]:
    """What `encode` gives; AdapterError where a rounded format cannot hold the values."""
    code = WIRE_DTYPES[dtype]
    if code == "F32":
        return encode(values, code, layout)
    # The values too: rounding to bfloat16 can carry a NaN over into a zero.
    if np.isfinite(largest(values)):
        chunk, scales = encode(values, code, layout)
        if np.isfinite(largest(decode(chunk, code, values.shape, layout, scales))):
            return chunk, scales
    raise AdapterError(f"{tensor} holds values too large for {dtype} or not finite: send float32")


def budget_bytes(shapes: Shapes, rank: int, dtype: str = "float32") -> int:
    """The most bytes that an honest adapter of this rank over these modules can take.

    sum r (m + n) values at their width, the scales of int8, and room for the header (1 KiB a
    module).
    """
    code = WIRE_DTYPES[dtype]
    values = sum(encoded_bytes(code, rank * size) for shape in shapes.values() for size in shape)
    return values + limits_of(shapes, rank).header_bytes


def unpack(packed: bytes, known: Adapter | None = None, limits: Limits | None = None) -> Adapter:
    """Bytes -> Adapter, checking everything that the bytes claim before relying on it.

    Besides the adapter itself nothing of its size is allocated, and nothing of it where the bytes
    are refused for more than their numbers.

    limits: by default only the header is bounded.
    known: where only one factor of a module travels, the first rows of A or columns of s B of this
    adapter are the other.

    Raises AdapterError, and nothing else, for any input that `pack` did not make: lying lengths,
    gaps, overlaps, unknown dtypes, missing halves, non-finite values, a wrong hash; and for one
    with a dense module, which no client may send.
    """
    return Adapter(_unpacked(packed, known, limits or Limits(), with_dense=False)[0])


def unpack_delta(packed: bytes) -> Delta:
    """Bytes -> what the server adds to the base: as `unpack`, but a module may be dense.

    >>> x = Delta({"q": Dense(np.ones((3, 2), np.float32))})
    >>> unpack_delta(pack(x))["q"].values[0].tolist()
    [1.0, 1.0]
    """
    factors, dense = _unpacked(packed, None, Limits(), with_dense=True)
    return Delta({**factors, **dense})


def _unpacked(
    packed: bytes, known: Adapter | None, limits: Limits, with_dense: bool
) -> tuple[dict[str, Factors], dict[str, Dense]]:
    """The modules that are factors, and those that are dense."""
    header, data = split(packed, limits.header_bytes)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise AdapterError(f"expected an adapter in format {FORMAT}; its header names no such one")
    if metadata.get("sha256") != hashlib.sha256(data).hexdigest():
        raise AdapterError("the data does not match the SHA-256 in its header: damaged on the way")
    scales = _read_scales(str(metadata.get("scales")), header)
    tensors = _read_tensors(header, data, limits, with_dense)
    modules: dict[str, Factors] = {}
    dense: dict[str, Dense] = {}
    for name, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise AdapterError(
                f"the scale of module {name!r:.200} must be a number; got {scale!r:.80}"
            )
        if name + DENSE in tensors:
            if scale != 1.0:
                raise AdapterError(
                    f"module {name!r:.200} is dense and its scale must be 1; got {scale!r:.80}"
                )
            dense[name] = Dense(tensors.pop(name + DENSE))
            continue
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
    return modules, dense


def as_sent(adapter: Adapter, dtype: str, factors: str = "both") -> Adapter:
    """What whoever has the rest of this adapter holds after receiving these factors of it.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> as_sent(x, "int8", "A")["q"].a.round(3).tolist()
    [[1.0, 1.0]]
    """
    return unpack(pack(adapter, dtype, factors), adapter)


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
        with np.errstate(over="ignore", invalid="ignore"):
            b = known.b[:, : a.shape[0]] * np.float32(known.scale / scale)
        if not np.isfinite(largest(b)):
            raise AdapterError(f"its scale is too small for the lora_B that is here; got {scale}")
        return a, b
    return known.a[: b.shape[1]], b


def _read_scales(text: str, tensors: Iterable[str]) -> dict[str, object]:
    """Module -> its scale, not yet checked."""
    scales = parse_json(text, "scales")
    if isinstance(scales, int | float) and not isinstance(scales, bool):
        halves = (name.rpartition(".lora_") for name in tensors)
        shared = {module: scales for module, _, letter in halves if letter in LAYOUTS}
        whole = [name.removesuffix(DENSE) for name in tensors if name.endswith(DENSE)]
        scales = {**shared, **dict.fromkeys(whole, scales)}
    if not isinstance(scales, dict):
        raise AdapterError(
            f"the scales must be one number or a JSON object; got {type(scales).__name__}"
        )
    if not scales:
        raise AdapterError("there is no module in this adapter: its header names no scale")
    return scales


def _read_tensors(
    header: dict[str, Any], data: memoryview, limits: Limits, with_dense: bool
) -> dict[str, FloatArray]:
    """The factors; one in int8 with the scales of its blocks, which follow it."""
    tensors = {}
    at, left = 0, limits.values
    entries = iter(header.items())
    for name, entry in entries:
        code, shape = _claimed_factor(name, entry)
        if name.endswith(DENSE) and not with_dense:
            raise AdapterError(
                f"tensor {name!r:.200} is a dense delta, where factors were expected"
            )
        if limits.factors not in (name[-1:], "both"):
            raise AdapterError(
                f"tensor {name!r:.200} came where lora_{limits.factors} alone was asked for"
            )
        left -= shape[0] * shape[1]
        if left < 0:
            raise AdapterError(
                f"tensor {name!r:.200} of shape {list(shape)} goes beyond the {limits.values:,} "
                "values that this client's adapter has"
            )
        chunk = tensor_bytes(name, entry, at, ITEM_BYTES[code] * shape[0] * shape[1], data)
        at += len(chunk)
        scales = data[:0]
        if code == "I8":
            blocks = num_blocks(shape[0] * shape[1])
            follower, entry = next(entries, ("nothing", {}))
            if follower != name + SCALES or claimed(entry, 1) != (SCALE_CODE, [blocks]):
                raise AdapterError(
                    f"tensor {name!r:.200} in I8 must be followed by its {SCALES}, {blocks} of "
                    f"them in {SCALE_CODE}; got {follower!r:.200}: {entry!r:.200}"
                )
            scales = tensor_bytes(follower, entry, at, ITEM_BYTES[SCALE_CODE] * blocks, data)
            at += len(scales)
        try:
            values = decode(chunk, code, shape, LAYOUTS.get(name[-1:], "C"), scales)
        except AdapterError as error:
            raise AdapterError(f"tensor {name!r:.200}: {error}") from None
        if not np.isfinite(largest(values)):
            raise AdapterError(f"tensor {name!r:.200} holds values that are not finite")
        tensors[name] = values
    if at != len(data):
        raise AdapterError(f"{len(data) - at} bytes follow the last tensor")
    return tensors


def _claimed_factor(name: str, entry: object) -> tuple[str, tuple[int, int]]:
    found = claimed(entry, 2)
    if found is None or found[0] not in ITEM_BYTES:
        raise AdapterError(
            f"tensor {name!r:.200} must have a dtype of {', '.join(ITEM_BYTES)}, a shape of two "
            f"sizes up to {MAX_DIMENSION} and two data_offsets; got {entry!r:.200}"
        )
    code, (rows, columns) = found
    return code, (rows, columns)
