"""A packed adapter inside a Flower record: one byte array, whatever the number of modules.

Flower asks for every array of a record on its own, so one array costs one request and an array for
each tensor costs hundreds.
"""

from flwr.app import Array, ArrayRecord

from core.errors import AdapterError, listing, quoted

KEY = "packed"
STYPE = "bouquet.adapter"
PIECE = "piece-"
"""Before the version of a part of `merged`, the name of the record that carries it."""


def to_record(packed: bytes) -> ArrayRecord:
    """A record that carries these bytes as they are.

    >>> from_record(to_record(b"abc"))
    b'abc'
    """
    return ArrayRecord({KEY: Array(dtype="uint8", shape=(len(packed),), stype=STYPE, data=packed)})


def from_record(record: object, limit: int | None = None) -> bytes:
    """The bytes of a record; AdapterError unless it is one byte array of at most `limit` bytes."""
    if not isinstance(record, ArrayRecord) or list(record) != [KEY]:
        raise AdapterError(
            f"expected an ArrayRecord with the one array {KEY!r}; got "
            + (_arrays(record) if isinstance(record, ArrayRecord) else "none")
        )
    array = record[KEY]
    if array.dtype != "uint8" or array.stype != STYPE:
        raise AdapterError(
            f"expected uint8 bytes of type {STYPE}; got {array.dtype!r:.40} of {array.stype!r:.40}"
        )
    if array.shape != (len(array.data),):
        raise AdapterError(
            f"{len(array.data):,} bytes came under a shape of {tuple(array.shape)!s:.40}"
        )
    if limit is not None and len(array.data) > limit:
        raise AdapterError(f"{len(array.data):,} bytes came where at most {limit:,} can be needed")
    return array.data


def _arrays(record: ArrayRecord) -> str:
    names = listing(f"'{quoted(name, 40)}'" for name in record)
    return f"arrays [{names}]"
