"""The number formats in which a factor travels, and what rounding to them costs.

    F32    float32 as it is: exact
    BF16   bfloat16, half the bytes: 8 significant bits, float32's range
    F16    float16, half the bytes: 11 significant bits, at most 65504
    I8     int8 in blocks, about a quarter: q = round(x / s), one scale s for every 256 values

A block is 256 consecutive values of a factor as it lies in memory, A row by row and B column by
column, so that a block holds one or a few directions and a small direction is not rounded by the
measure of a large one. Its scale is max|x| / 127 in bfloat16, whose range is that of float32: with
float16 the blocks of a barely trained B would lose theirs. s has 8 significant bits and q has 7, so
q s is exact in float32, and packing what was unpacked gives the same q and s again.

The error of a value is at most s / 2, that is max|block| / 254, and up to 2^-8 of that more because
s is rounded. A block below 127 * 2^-126 has the smallest normal s, and one of zeros too.
"""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from adapters.adapter import FloatArray
from core.errors import AdapterError

WIRE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
BLOCK = 256
LEVELS = 127
SCALE_CODE = "BF16"
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)

Layout: TypeAlias = Literal["C", "F"]
"""How a factor lies in memory: A by row (`C`), B by column (`F`)."""
Bytes: TypeAlias = bytes | memoryview


def num_blocks(count: int) -> int:
    """How many scales `count` values in int8 come with.

    >>> [num_blocks(count) for count in (0, 1, 256, 257)]
    [0, 1, 1, 2]
    """
    return -(-count // BLOCK)


def encoded_bytes(code: str, count: int) -> int:
    """The bytes of a factor of `count` values, its scales included.

    >>> [encoded_bytes(code, 256) for code in ("F32", "BF16", "I8")]
    [1024, 512, 258]
    """
    scales = ITEM_BYTES[SCALE_CODE] * num_blocks(count) if code == "I8" else 0
    return ITEM_BYTES[code] * count + scales


def encode(values: FloatArray, code: str, layout: Layout) -> tuple[bytes, bytes]:
    """The values (rows, columns) in this format, row by row; and for I8 the scales of its blocks.

    The values must be finite, but for F32. A value beyond the format's range comes out as one that
    is not finite when decoded.
    """
    if code == "I8":
        return _encode_blocks(values, layout)
    values = np.ascontiguousarray(values)
    encoded: npt.NDArray[Any]
    with np.errstate(over="ignore"):
        if code == "BF16":
            encoded = _to_bfloat16(values)
        else:
            encoded = values.astype("<f2" if code == "F16" else "<f4", copy=False)
    return encoded.tobytes(), b""


def decode(
    data: Bytes, code: str, shape: tuple[int, int], layout: Layout, scales: Bytes = b""
) -> FloatArray:
    """Bytes of the right length -> values (rows, columns) in this layout, in memory of their own.

    Nothing else of the size of the factor is allocated. Values need not be finite.
    Raises AdapterError for a scale that is not a finite number above zero, and for -128 in I8,
    which `encode` never writes.

    >>> data, scales = encode(np.array([[0.0, 1.3, -127.0]], np.float32), "I8", "C")
    >>> decode(data, "I8", (1, 3), "C", scales).tolist()
    [[0.0, 1.0, -127.0]]
    """
    if code == "BF16":
        upper = np.array(np.frombuffer(data, "<u2").reshape(shape), np.uint32, order=layout)
        upper <<= 16
        return upper.view(np.float32)
    stored = {"F32": "<f4", "F16": "<f2", "I8": "i1"}[code]
    values = np.array(np.frombuffer(data, stored).reshape(shape), np.float32, order=layout)
    if code == "I8":
        _scale_blocks(values.reshape(-1, order=layout), _decode_scales(scales))
    return values


def _to_bfloat16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, as the hardware does: keep the upper half of each float32."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _encode_blocks(values: FloatArray, layout: Layout) -> tuple[bytes, bytes]:
    blocks = np.zeros((num_blocks(values.size), BLOCK), np.float32)
    blocks.reshape(-1)[: values.size] = values.reshape(-1, order=layout)
    exact = np.abs(blocks).max(axis=1, initial=0.0) / np.float32(LEVELS)
    scales = _to_bfloat16(np.maximum(exact, np.float32(SMALLEST_SCALE)))
    blocks /= _from_bfloat16(scales)[:, None]
    # A scale that was rounded down would take the largest value to 127.5.
    rounded = np.clip(np.rint(blocks), -LEVELS, LEVELS).astype(np.int8).reshape(-1)
    return rounded[: values.size].reshape(values.shape, order=layout).tobytes(), scales.tobytes()


def _from_bfloat16(upper: npt.NDArray[np.uint16]) -> FloatArray:
    return (upper.astype(np.uint32) << 16).view(np.float32)


def _decode_scales(data: Bytes) -> FloatArray:
    scales = _from_bfloat16(np.frombuffer(data, "<u2"))
    wrong = ~(np.isfinite(scales) & (scales > 0.0))
    if wrong.any():
        raise AdapterError(
            f"the scale of every block must be finite and above zero; got {scales[wrong][0]:g} for "
            f"block {int(wrong.argmax())} of {len(scales)}"
        )
    return scales


def _scale_blocks(flat: FloatArray, scales: FloatArray) -> None:
    """Multiply every block by its scale, in place; the last may be short."""
    if flat.size and flat.min() < -LEVELS:
        raise AdapterError(f"values in int8 go from -{LEVELS} to {LEVELS}; got -128")
    whole = flat.size // BLOCK
    with np.errstate(over="ignore"):
        flat[: whole * BLOCK].reshape(whole, BLOCK)[:] *= scales[:whole, None]
        flat[whole * BLOCK :] *= scales[whole:]
