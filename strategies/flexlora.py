"""FlexLoRA: the exact mean of the deltas, cut to each client's rank by singular values.

Bai, Chen, Qian, Yao, Li: "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
and Client Resources", NeurIPS 2024, arXiv 2402.11505.

    sum_k p_k s_k B_k A_k = U S V',   B <- (U S)[:, :R],   A <- V'[:R]   (scale 1)

A client of rank r_k goes on from the first r_k directions, the best approximation of its rank; what
lies beyond is its distribution noise. R is the largest rank of any client, and what lies beyond R
the aggregation noise. The authors form the dense mean and decompose that; here the singular value
decomposition is that of the stacked factors where they are the smaller form
(adapters/refactoring.py), which is the same.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import with_row_norm
from adapters.refactoring import refactor
from strategies.padding import largest_rank
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy


@dataclass(frozen=True)
class FlexLora(Strategy):
    """start <- the first R singular directions of sum_k p_k s_k B_k A_k."""

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; exact only while the mean has at most rank R."""
        return Properties(
            title="FlexLoRA",
            source="NeurIPS 2024, arXiv 2402.11505",
            mixed_ranks=True,
            exact=False,
            reveals="a mixture of all clients' directions; with two clients, each other's delta",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b R D",
            forgets_unseen=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client, at the largest rank."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The best approximation of the mean delta, its rows of A orthonormal."""
        rank = largest_rank(model, cohort.updates)
        best = refactor(cohort.total, rank=rank).adapter
        return Aggregated(GlobalModel(merged=model.merged, start=with_row_norm(best, 1.0)))
