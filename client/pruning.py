"""The penalty by which a client that may lower its rank shrinks its last directions.

From HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432); what it then keeps: adapters/pruning.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
