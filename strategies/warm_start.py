"""What a round begins from, where the method leaves it open.

The global model is G = merged + start, whatever the split; the policies differ in what is left to
train. With U S V' the singular value decomposition, sorted, and r the largest rank of any client:

    random      start <- none: each client draws A, B = 0 (FLoRA as published)
    keep-a      start <- (A = the first r rows of V' of the increment, B = 0)
    increment   start <- the first r directions of the increment, merged <- G - start
    global      start <- the first r directions of G,             merged <- G - start

The increment is what the last round added to G. Rows of A are scaled to the length that a freshly
drawn row has, about 1/sqrt(3), so that a step of the optimizer moves the delta about as far as it
does after a fresh start; their singular values are in B. A client of rank r_k < r trains the first
r_k directions and keeps the others frozen (LocalRule.freezes_tail): nobody's model loses anything.

FedMomentum (arXiv 2603.08014, 2026) is of the same kind: the exact sum is decomposed, its leading
part becomes the clients' LoRA again, and the residual goes into the backbone. Here, unlike there,
rows of A have the length of freshly drawn ones, mixed ranks work by frozen tails, and what is
decomposed may be the newest increment or, as in `flora-warm`, all of G.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import numpy as np

from adapters.adapter import Adapter, Delta, Dense, Factors, Form
from adapters.algebra import add, module_norms, with_row_norm
from adapters.dense import summed
from adapters.refactoring import compact, leading, refactor
from adapters.terms import MINUS, PLUS, Term
from strategies.strategy import GlobalModel, whole_number

Policy: TypeAlias = Literal["random", "keep-a", "increment", "global"]
RANDOM: Policy = "random"
POLICIES: tuple[Policy, ...] = get_args(Policy)
FRESH_ROW_NORM = 3.0**-0.5
ROUNDING = 1e-6
"""A direction below this share of ||G|| is rounding: clients draw a fresh one in its place."""


def begin_next_round(policy: str, before: GlobalModel, total: Delta) -> GlobalModel:
    """Split `total`, the new global model, into merged and start.

    before: the global model that the round began from; its state holds the `rank` of starts.
    """
    rank = whole_number(before.state, "rank", total.rank)
    if policy == RANDOM:
        return GlobalModel(merged=total, state=before.state)
    old = None if policy == "global" else before.total()
    newest = total if old is None else add([total, old], [1.0, -1.0])
    first, beyond = _split(newest, rank, module_norms([(1.0, total)]))
    start = with_row_norm(first, FRESH_ROW_NORM)
    if policy == "keep-a":
        return GlobalModel(merged=total, start=_without_b(start), state=before.state)
    if old is not None:  # a sum, not total - start: that would leave rounding at full rank
        beyond = compact(add([old, beyond], [1.0, 1.0]))
    return GlobalModel(merged=beyond, start=start, state=before.state)


def without_start(added: Delta, after: GlobalModel) -> tuple[Term, ...]:
    """What merged gained where G was to gain `added` over the merged before: added - start.

    The start itself is sent to every site, so that `added` is all else that a site lacks.
    """
    if after.start is None or not any(f.b.any() for f in after.start.values()):
        return (Term(PLUS, added),)
    return Term(PLUS, added), Term(MINUS, after.start)


def _split(delta: Delta, rank: int, sizes: Mapping[str, float]) -> tuple[Adapter, Delta]:
    """The first `rank` directions, less those that are only rounding, and all that is beyond."""
    first: dict[str, Factors] = {}
    beyond: dict[str, Form] = {}
    for name, form in delta.items():
        if isinstance(form, Dense):
            f, values = leading(form, rank)
        else:
            found = refactor(Delta({name: form}))
            f, values = found.adapter[name], found.singular_values[name][:rank]
        real = int((values > ROUNDING * sizes[name]).sum())
        first[name] = Factors(f.a[:real], f.b[:, :real], f.scale)
        if isinstance(form, Dense):
            rest = summed([(1.0, form), (-1.0, first[name])], form.shape)
            beyond[name] = Dense(np.asarray(rest, np.float32))
        else:
            beyond[name] = Factors(f.a[real:], f.b[:, real:], f.scale)
    return Adapter(first), Delta(beyond)


def _without_b(adapter: Adapter) -> Adapter:
    return Adapter({n: Factors(f.a, np.zeros_like(f.b), f.scale) for n, f in adapter.items()})
