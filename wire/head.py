"""A head in safetensors form: it travels like the adapter, and is checked like one."""

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapters.adapter import FloatArray
from adapters.head import Head, HeadShapes, head_shapes
from core.errors import AdapterError, listing

HEADER_BYTES_PER_ARRAY = 512


def pack_head(head: Head) -> bytes:
    """Head -> bytes in safetensors form; the same head always gives the same bytes.

    >>> unpack_head(pack_head({"bias": np.ones(2, np.float32)}), {"bias": (2,)})["bias"].tolist()
    [1.0, 1.0]
    """
    arrays = {name: np.asarray(head[name], np.float32, order="C") for name in sorted(head)}
    return bytes(save(arrays))


def head_budget_bytes(shapes: HeadShapes) -> int:
    """The most bytes that an honest head of these shapes can take."""
    values = sum(int(np.prod(shape)) for shape in shapes.values())
    return 4 * values + HEADER_BYTES_PER_ARRAY * (len(shapes) + 1)


def unpack_head(packed: bytes, shapes: HeadShapes) -> dict[str, FloatArray]:
    """Bytes -> head of exactly these shapes, finite and float32; AdapterError for anything else."""
    if len(packed) > head_budget_bytes(shapes):
        raise AdapterError(
            f"a head of these shapes takes at most {head_budget_bytes(shapes)} bytes; got "
            f"{len(packed)}"
        )
    try:
        arrays = load(packed)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"the head is not in safetensors form: {error}") from None
    if head_shapes(arrays) != dict(shapes):
        odd = sorted(set(head_shapes(arrays).items()) ^ set(shapes.items()))
        raise AdapterError(f"the head differs from the base model's in {listing(odd)}")
    for name, values in arrays.items():
        if values.dtype != np.float32:
            raise AdapterError(f"{name} of the head must be float32; got {values.dtype}")
        if not np.isfinite(values).all():
            raise AdapterError(f"{name} of the head holds values that are not finite")
    return {name: arrays[name] for name in sorted(arrays)}
