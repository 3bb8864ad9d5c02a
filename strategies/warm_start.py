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
"""

from collections.abc import Mapping

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.algebra import module_norms, stack, with_row_norm
from adapters.errors import UsageError
from adapters.refactoring import Refactored, refactor
from strategies.strategy import GlobalModel

RANDOM = "random"
POLICIES = (RANDOM, "keep-a", "increment", "global")
FRESH_ROW_NORM = 3.0**-0.5
ROUNDING = 1e-6
"""A direction below this share of ||G|| is rounding: clients draw a fresh one in its place."""


def check_policy(policy: str) -> str:
    """The policy itself; UsageError where there is none of that name."""
    if policy not in POLICIES:
        raise UsageError(f"start.policy must be one of {', '.join(POLICIES)}; got {policy!r}")
    return policy


def begin_next_round(policy: str, before: GlobalModel, total: Adapter) -> GlobalModel:
    """Split `total`, the new global model, into merged and start.

    before: the global model that the round began from; its memory holds the `rank` of starts.
    """
    rank = int(before.memory["rank"]) if "rank" in before.memory else total.rank
    if policy == RANDOM:
        return GlobalModel(merged=total, memory=before.memory)
    old = None if policy == "global" else before.total()
    newest = total if old is None else stack([total, old], [1.0, -1.0])
    leading, beyond = _split(refactor(newest), rank, module_norms([(1.0, total)]))
    start = with_row_norm(leading, FRESH_ROW_NORM)
    if policy == "keep-a":
        return GlobalModel(merged=total, start=_without_b(start), memory=before.memory)
    if old is not None:  # a sum, not total - start: that would leave rounding at full rank
        beyond = refactor(stack([old, beyond], [1.0, 1.0])).adapter
    return GlobalModel(merged=beyond, start=start, memory=before.memory)


def without_start(added: Adapter, after: GlobalModel) -> Adapter:
    """What merged gained where G was to gain `added` over the merged before: added - start."""
    return added if after.start is None else stack([added, after.start], [1.0, -1.0])


def _split(found: Refactored, rank: int, sizes: Mapping[str, float]) -> tuple[Adapter, Adapter]:
    """The first `rank` directions, less those that are only rounding, and all others."""
    leading, beyond = {}, {}
    for name, f in found.adapter.items():
        real = int((found.singular_values[name][:rank] > ROUNDING * sizes[name]).sum())
        leading[name] = Factors(f.a[:real], f.b[:, :real], f.scale)
        beyond[name] = Factors(f.a[real:], f.b[:, real:], f.scale)
    return Adapter(leading), Adapter(beyond)


def _without_b(adapter: Adapter) -> Adapter:
    return Adapter({n: Factors(f.a, np.zeros_like(f.b), f.scale) for n, f in adapter.items()})
