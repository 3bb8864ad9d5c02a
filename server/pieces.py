"""Merged in pieces, for sites that keep what they received: a round then sends only what is new.

    merged = sum of the pieces, each named by the hash of its bytes

A piece is what one round added, or now and then all of merged, written anew at its lowest rank.
Which it is depends on ranks alone and not on who holds what, so that a site which lost everything
and gets all pieces has bit for bit what the others have.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import stack
from adapters.codec import pack
from adapters.refactoring import refactor
from strategies.strategy import GlobalModel

MOST_TIMES_ITS_SIZE = 2.0
"""All pieces together hold at most this many times the values of merged at its lowest rank."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of merged, as it travels."""

    adapter: Adapter
    packed: bytes
    version: str
    """SHA-256 of `packed`, its first 128 bits."""


def piece_of(adapter: Adapter, wire_dtype: str) -> Piece:
    """The adapter as a piece.

    >>> from adapters.adapter import draw
    >>> one, two = (piece_of(draw({"q": (3, 4)}, 2, 7, 1.0), "float32") for _ in range(2))
    >>> one.version == two.version
    True
    """
    packed = pack(adapter, wire_dtype)
    return Piece(adapter, packed, hashlib.sha256(packed).hexdigest()[:32])


def in_pieces(
    pieces: Sequence[Piece], before: GlobalModel, after: GlobalModel, wire_dtype: str
) -> tuple[tuple[Piece, ...], Adapter | None]:
    """The pieces after a round that went from `before` to `after`, and merged as their sum.

    pieces: those of `before`. What the round added becomes one more where the method tells it
    (`after.increment`) and the sum does not outgrow merged.
    """
    if after.merged is None:
        return (), None
    if after.merged is before.merged:
        return tuple(pieces), before.merged
    if after.increment is not None:
        newest = refactor(after.increment).adapter
        values = sum(p.adapter.num_parameters for p in pieces) + newest.num_parameters
        if values <= MOST_TIMES_ITS_SIZE * after.merged.num_parameters:
            joined = (*pieces, piece_of(newest, wire_dtype))
            return joined, sum_of(joined)
    whole = (piece_of(after.merged, wire_dtype),)
    return whole, sum_of(whole)


def sum_of(pieces: Sequence[Piece]) -> Adapter | None:
    """The pieces side by side, in their order; None where there is none."""
    adapters = [piece.adapter for piece in pieces]
    return stack(adapters, [1.0] * len(adapters)) if adapters else None
