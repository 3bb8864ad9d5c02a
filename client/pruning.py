"""A client that lowers its own rank: a penalty on its last directions, and whether to drop them.

From HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): the rest are the directions from
floor(share r) on, its size is sum over modules ||B_rest||_F ||A_rest||_F.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.adapter import Adapter
from adapters.algebra import beyond, truncate


def kept_rank(rank: int, share: float) -> int:
    """floor(share rank), at least 1.

    >>> kept_rank(64, 0.99), kept_rank(8, 1.0), kept_rank(1, 0.5)
    (63, 8, 1)
    """
    return max(1, int(share * rank))


def rest_size(adapter: Adapter, rank: int) -> float:
    """Sum over modules of ||B_rest||_F ||A_rest||_F, the rest being what is beyond this rank."""
    return float(
        sum(np.linalg.norm(f.b) * np.linalg.norm(f.a) for f in beyond(adapter, rank).values())
    )


def pruned(before: Adapter, after: Adapter, share: float) -> Adapter:
    """`after`, cut to floor(share r) where what is cut off shrank in training."""
    rank = kept_rank(after.rank, share)
    return truncate(after, rank) if rest_size(after, rank) < rest_size(before, rank) else after


@dataclass(frozen=True)
class RestPenalty:
    """weight * sum over modules ||B_rest||_F ||A_rest||_F, differentiable."""

    weight: float
    rank: int
    """The rest begins here."""

    def __call__(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """factors: (A, B) of each module."""
        sizes = [
            torch.linalg.vector_norm(b[:, self.rank :]) * torch.linalg.vector_norm(a[self.rank :])
            for a, b in factors
        ]
        return self.weight * torch.stack(sizes).sum()
