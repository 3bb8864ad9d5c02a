"""Zero-padding: FedAvg of factors padded with zeros to the largest rank of the run.

The baseline for mixed ranks in Wang et al., "FLoRA", NeurIPS 2024, arXiv 2409.05976, section 4, and
in Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP
2024, arXiv 2401.06432.

    A <- sum_k p_k pad(A_k),   B <- sum_k p_k pad(s_k B_k)   (scale 1)

A client of rank r_k goes on from the first r_k rows of A and columns of B. Besides FedAvg's cross
terms, the zeros of low-rank clients dilute the directions that only high-rank clients train.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from strategies.padding import pad_updates
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean


@dataclass(frozen=True)
class ZeroPadding(Strategy):
    """start <- FedAvg of the padded factors."""

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; not exact."""
        return Properties(
            title="Zero-padding",
            source="baseline of arXiv 2409.05976 and 2401.06432",
            mixed_ranks=True,
            exact=False,
            reveals="the mean of the factors; above all others' ranks, a client's own rows alone",
            sums_only=True,
            bytes_up="b r_k D",
            bytes_down="b R D",
            averages=True,
            forgets_unseen=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client, at the largest rank."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The weighted mean of the padded factors; the rank of the global model never falls."""
        start = mean(pad_updates(model, cohort.updates))
        return Aggregated(GlobalModel(merged=model.merged, start=start))
