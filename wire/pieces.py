"""A term of merged as it travels: a delta with its bytes and their hash."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter, Delta
from adapters.terms import PLUS, Term, sum_of_terms
from wire.codec import pack


@dataclass(frozen=True, eq=False)
class Piece:
    """A term of merged, as it travels."""

    kind: str
    delta: Delta
    packed: bytes
    version: str
    """SHA-256 of `packed`, its first 128 bits."""


def piece_of(delta: Delta, wire_dtype: str, kind: str = PLUS) -> Piece:
    """The delta as a piece.

    >>> from adapters.adapter import draw
    >>> one, two = (piece_of(draw({"q": (3, 4)}, 2, 7, 1.0), "float32") for _ in range(2))
    >>> one.version == two.version
    True
    """
    packed = pack(delta, wire_dtype)
    return Piece(kind, delta, packed, hashlib.sha256(packed).hexdigest()[:32])


def sum_of(pieces: Sequence[Piece], start: Adapter | None = None) -> Delta | None:
    """The sum of the pieces, in their order; None where there is none.

    start: what steps are steps of.
    """
    return sum_of_terms([Term(piece.kind, piece.delta) for piece in pieces], start)
