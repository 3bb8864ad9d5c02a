"""Bytes in safetensors form: a header that claims, and data that it claims things of.

    8 bytes   length of the header, little endian
    header    JSON: tensor name -> dtype, shape, data_offsets; and __metadata__
    data      the tensors, in the order of the header, without gaps

Nothing that a header says is believed: `split` bounds it before it is parsed, and `tensor_bytes`
holds every claim against the bytes that are really there before anything of that size is made.
"""

import json
from typing import Any

from core.errors import AdapterError

MAX_HEADER_BYTES = 64 << 20
MAX_DIMENSION = 2**31 - 1


def frame(entries: dict[str, Any], data: bytes) -> bytes:
    """Header and data in one; the data begin at a multiple of eight."""
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def split(packed: bytes, max_header: int = MAX_HEADER_BYTES) -> tuple[dict[str, Any], memoryview]:
    """The parsed header, and the data as a view of these bytes.

    Raises AdapterError where the header is cut, longer than `max_header` or no JSON object.

    >>> split(frame({"q": 1}, b"data"))[1].tobytes()
    b'data'
    """
    if len(packed) < 8:
        raise AdapterError(f"an adapter takes at least 8 bytes; got {len(packed)}")
    length = int.from_bytes(packed[:8], "little")
    if length > len(packed) - 8:
        raise AdapterError(
            f"the header claims {length} bytes, but {len(packed) - 8} follow: truncated or not an "
            "adapter"
        )
    if length > max_header:
        raise AdapterError(
            f"the header claims {length} bytes, where at most {max_header} can be needed"
        )
    header = parse_json(packed[8 : 8 + length], "header")
    if not isinstance(header, dict):
        raise AdapterError(f"the header must be a JSON object; got {type(header).__name__}")
    return header, memoryview(packed)[8 + length :]


def parse_json(text: bytes | str, what: str) -> Any:
    """What this JSON says; AdapterError where it is none, or a name stands twice in an object."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the {what} is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands twice")
    return entries


def claimed(entry: object, dimensions: int) -> tuple[str, list[int]] | None:
    """The dtype and the shape that an entry claims; None where it is no entry of so many sizes.

    >>> claimed({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, 2)
    ('F32', [2, 3])
    """
    match entry:
        case {"dtype": str(code), "shape": [*sizes], "data_offsets": [begin, end]} if (
            len(sizes) == dimensions
            and all(_is_int(number) for number in (*sizes, begin, end))
            and all(0 <= size <= MAX_DIMENSION for size in sizes)
        ):
            return code, sizes
    return None


def tensor_bytes(
    name: str, entry: dict[str, Any], at: int, num_bytes: int, data: memoryview
) -> memoryview:
    """The bytes of a tensor of a `claimed` entry, which must lie where the one before it ended."""
    begin, end = entry["data_offsets"]
    if begin != at or end != at + num_bytes or end > len(data):
        raise AdapterError(
            f"tensor {name!r:.200} of shape {entry['shape']} should lie at bytes {at} to "
            f"{at + num_bytes} of {len(data)}; its header says {begin} to {end}"
        )
    return data[begin:end]


def _is_int(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)  # JSON's true is an int here
