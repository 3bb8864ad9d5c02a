"""FedAvg of the factors (FedIT): average A and B each on its own.

McMahan, Moore, Ramage, Hampson, Agueera y Arcas: "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, arXiv 1602.05629; on LoRA factors: Zhang et al., "Towards
Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024, arXiv 2305.05644.

    A <- sum_k p_k A_k,   B <- sum_k p_k s_k B_k   (scale 1)

B A contains cross terms p_i p_j s_i B_i A_j that no client trained: the aggregation noise. All
clients begin from one A, drawn from the run's seed: factors that began apart do not average.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean


@dataclass(frozen=True)
class FedAvg(Strategy):
    """start <- (mean of A, mean of s B); one rank for all clients."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; not exact."""
        return Properties(
            title="FedAvg (FedIT)",
            source="ICASSP 2024, arXiv 2305.05644",
            mixed_ranks=False,
            exact=False,
            reveals="the mean of the factors; with two clients, each other's factors",
            sums_only=True,
            bytes_up="b r D",
            bytes_down="b r D",
            averages=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The weighted mean of each factor."""
        return Aggregated(GlobalModel(merged=model.merged, start=mean(cohort.updates)))
