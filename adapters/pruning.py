"""Pruning: the rank that a client keeps, and what it drops. Client and server use the same rule.

From HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432), rounded as in the code of FlexLoRA's
authors, which is the public one.
"""

from fractions import Fraction

import numpy as np

from adapters.adapter import Adapter
from adapters.algebra import beyond, truncate


def kept_rank(rank: int, share: float, min_rank: int = 1) -> int:
    """The share of a rank, rounded to the nearest whole number (halves to the even one).

    share: in (0, 1], taken as the decimal number that it is written as: 0.7 of 90 is 63.
    min_rank: no rank falls below this one; a lower one stays as it is. A share of 0.99 leaves
    ranks up to 50 alone.

    >>> kept_rank(64, 0.99), kept_rank(50, 0.99), kept_rank(90, 0.7), kept_rank(8, 0.5, 6)
    (63, 50, 63, 6)
    >>> kept_rank(3, 0.5, 6), kept_rank(1, 0.1), kept_rank(8, 1.0)
    (3, 1, 8)
    """
    return max(min(rank, max(min_rank, 1)), round(Fraction(repr(float(share))) * rank))


def rest_size(adapter: Adapter, rank: int) -> float:
    """Sum over modules of ||B_rest||_F ||A_rest||_F, the rest being what is beyond this rank."""
    return float(
        sum(np.linalg.norm(f.b) * np.linalg.norm(f.a) for f in beyond(adapter, rank).values())
    )


def pruned(before: Adapter, after: Adapter, rank: int) -> Adapter:
    """`after`, cut to this rank where what is cut off shrank in training."""
    return truncate(after, rank) if rest_size(after, rank) < rest_size(before, rank) else after
