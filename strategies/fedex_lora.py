"""FedEx-LoRA: FedAvg of the factors, and what that loses goes into the base.

Singhal, Ponkshe, Vepakomma: "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
of Foundation Models", ACL 2025, arXiv 2410.09432.

    A <- sum_k p_k A_k,   B <- sum_k p_k s_k B_k   (scale 1)
    merged <- merged + sum_k p_k s_k B_k A_k - B A

The residual is kept in low rank, at most K r + r a round, and refactored with what was merged
before; the authors form it densely and weigh all clients alike (clients.weights=uniform).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import stack
from adapters.refactoring import refactor
from strategies.strategy import (
    GlobalModel,
    Properties,
    Strategy,
    Update,
    ideal_increment,
    mean,
)


@dataclass(frozen=True)
class FedExLora(Strategy):
    """start <- mean of the factors, merged <- merged + what the mean is short of."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; exact."""
        return Properties(
            title="FedEx-LoRA",
            source="ACL 2025, arXiv 2410.09432",
            mixed_ranks=False,
            exact=True,
            reveals="the mean of the factors and a mixture of all clients' directions",
            sums_only=False,
            bytes_up="b r D",
            bytes_down="b (r + min(S T, m, n)) D",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, updates: Sequence[Update]) -> GlobalModel:
        """The mean of each factor, and the residual."""
        start = mean(updates)
        merged = residual = stack([ideal_increment(updates), start], [1.0, -1.0])
        if model.merged is not None:
            merged = stack([model.merged, residual], [1.0, 1.0])
        return GlobalModel(refactor(merged).adapter, start, increment=residual)
