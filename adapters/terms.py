"""Merged as a sum of terms, each of which travels once: server and sites add them up alike.

plus     + delta
minus    - delta, for a start that was taken out of the rest
step     delta(start + step) - delta(start), for a step of the factors of the start
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Delta, Factors
from adapters.algebra import add
from core.errors import AdapterError

PLUS, MINUS, STEP = "plus", "minus", "step"
KINDS = (PLUS, MINUS, STEP)


@dataclass(frozen=True, eq=False)
class Term:
    """One term of merged."""

    kind: str
    """One of KINDS."""
    delta: Delta
    """Of a step: factors that are added to those of the start, at its ranks and scales."""


def sum_of_terms(terms: Sequence[Term], start: Adapter | None = None) -> Delta | None:
    """The sum of the terms, in their order; None where there is none.

    start: what steps are steps of. Raises AdapterError for a step without one, of another rank or
    in a dense form.
    """
    if not terms:
        return None
    deltas = [stepped(start, term.delta) if term.kind == STEP else term.delta for term in terms]
    return add(deltas, [-1.0 if term.kind == MINUS else 1.0 for term in terms])


def stepped(start: Adapter | None, step: Delta) -> Adapter:
    """(B + dB)(A + dA) - B A = dB (A + dA) + B dA, without a difference of large terms.

    A stack of twice the rank, with the scale of the start. Zero where the step is zero.

    >>> one = Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 0.5)
    >>> moved = stepped(Adapter({"q": one}), Adapter({"q": one}))["q"]
    >>> (moved.scale * moved.b @ moved.a).tolist()[0]
    [1.5, 1.5]
    """
    if start is None:
        raise AdapterError("a step needs the start that it is a step of")
    modules = {}
    for name, at in start.items():
        d = step[name]
        if not isinstance(d, Factors) or d.rank != at.rank or d.scale != at.scale:
            raise AdapterError(f"{name}: a step needs factors of the rank and scale of its start")
        modules[name] = Factors(
            np.concatenate([at.a + d.a, d.a]), np.concatenate([d.b, at.b], axis=1), at.scale
        )
    return Adapter(modules)
