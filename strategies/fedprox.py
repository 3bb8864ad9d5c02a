"""FedProx: FedAvg of the factors, whose clients are held near where they began.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated Optimization in Heterogeneous Networks",
MLSys 2020, arXiv 1812.06127; here on LoRA factors.

    client k minimises   loss + mu/2 ||theta - theta_start||^2,   theta = (A, B) as it trains them
    A <- sum_k p_k A_k,   B <- sum_k p_k s_k B_k   (scale 1)

mu = 0 is FedAvg.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from settings.keys import key
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean
from wire.rules import LocalRule


@dataclass(frozen=True)
class FedProx(Strategy):
    """start <- (mean of A, mean of s B), of clients that stay near the start."""

    mu: float = key("Weight of the squared distance from the start.", default=0.1, at_least=0)

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; not exact."""
        return Properties(
            title="FedProx",
            source="MLSys 2020, arXiv 1812.06127",
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

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """The distance from the start is part of the loss."""
        return LocalRule(proximal=self.mu)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The weighted mean of each factor."""
        return Aggregated(GlobalModel(merged=model.merged, start=mean(cohort.updates)))
