"""Merged in pieces, for sites that keep what they received: a round then sends only what is new.

    merged = sum of the pieces, each named by the hash of its bytes

A piece is a term of what one round added (adapters/terms.py) or, now and then, all of merged
written anew in its cheapest form. A start that is itself a term of merged (it was taken out of the
rest, or steps are steps of it) is a piece too, and travels once. The choice of pieces depends on
the model alone, never on what a site already holds: a site that lost everything and gets all pieces
has bit for bit what the others have.
"""

from collections.abc import Sequence

from adapters.adapter import Adapter, Delta
from adapters.algebra import add
from adapters.refactoring import compact
from adapters.terms import MINUS, PLUS, Term
from strategies.strategy import GlobalModel, Strategy
from wire.pieces import Piece, piece_of, sum_of

MOST_TIMES_ITS_SIZE = 2.0
"""All pieces together hold at most this many times the values of the model in its cheapest form."""


def in_pieces(
    pieces: Sequence[Piece],
    before: GlobalModel,
    after: GlobalModel,
    wire_dtype: str,
    gained: Sequence[Term] | None = None,
) -> tuple[tuple[Piece, ...], Delta | None]:
    """The pieces after a round that went from `before` to `after`, and merged as their sum.

    pieces: those of `before`. What the round added joins them where the method tells it (`gained`)
    and all together do not outgrow the model. Written anew, a method whose
    starts are terms of merged has two: the whole model, less its start.
    """
    if after.merged is None:
        return (), None
    if after.merged is before.merged:
        return tuple(pieces), before.merged
    if gained is not None:
        joined = _cancelled([*pieces, *(_newest(term, wire_dtype) for term in gained)])
        values = sum(piece.delta.num_parameters for piece in distinct(joined))
        size = after.merged.num_parameters + (after.start.num_parameters if after.start else 0)
        if values <= MOST_TIMES_ITS_SIZE * size:
            return joined, sum_of(joined, after.start)
    whole = _anew(pieces, after, wire_dtype, gained or ())
    return whole, sum_of(whole, after.start)


def gained_at_first(
    strategy: Strategy, begun: GlobalModel, added: Sequence[Delta] = ()
) -> tuple[Term, ...] | None:
    """What merged is before round one, in terms: less the start, where that is of the base.

    added: what the run begins from besides.  None: the start is no term of merged.
    """
    if not strategy.properties.begins_from_base or begun.start is None:
        return None
    return Term(MINUS, begun.start), *(Term(PLUS, delta) for delta in added)


def _newest(term: Term, wire_dtype: str) -> Piece:
    """A term as a piece; a sum of clients' deltas in its cheapest form, in which they mix."""
    delta = compact(term.delta) if term.kind == PLUS else term.delta
    return piece_of(delta, wire_dtype, term.kind)


def _anew(
    pieces: Sequence[Piece], after: GlobalModel, wire_dtype: str, gained: Sequence[Term]
) -> tuple[Piece, ...]:
    """All of merged in one piece, or of the model where the start is a piece beside it."""
    assert after.merged is not None
    stays = any(kind != PLUS for kind in (*(t.kind for t in gained), *(p.kind for p in pieces)))
    if after.start is None or not stays:
        return (piece_of(after.merged, wire_dtype),)
    whole = compact(add([after.merged, after.start], [1.0, 1.0]))
    return piece_of(whole, wire_dtype), piece_of(after.start, wire_dtype, MINUS)


def _cancelled(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Without pairs of the same bytes that are added and taken away."""
    left: list[Piece] = []
    for piece in pieces:
        opposite = {PLUS: MINUS, MINUS: PLUS}.get(piece.kind)
        match = [k for k, p in enumerate(left) if p.version == piece.version and p.kind == opposite]
        if match:
            del left[match[0]]
        else:
            left.append(piece)
    return tuple(left)


def distinct(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece of each version: the same bytes travel once."""
    return list({piece.version: piece for piece in pieces}.values())


def start_piece(pieces: Sequence[Piece], start: Adapter | None, wire_dtype: str) -> str:
    """The version of the piece that the start is; empty where it is none and travels by itself."""
    taken_out = [piece for piece in pieces if piece.kind == MINUS]
    if start is None or not taken_out:
        return ""
    version = piece_of(start, wire_dtype).version
    return version if any(piece.version == version for piece in taken_out) else ""
