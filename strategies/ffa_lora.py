"""FFA-LoRA: A is drawn once and never trained; B alone is averaged, which is exact.

Sun, Li, Li, Ding: "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv
2403.12313.

    A <- A_0,   B <- sum_k p_k s_k B_k   (scale 1)

With one A for all, sum_k p_k s_k B_k A_0 is the mean of the deltas itself. The price is that only
the column space of B is learned. A_0 comes from the run's seed on every site and never travels.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter, Factors
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean
from wire.rules import LocalRule


@dataclass(frozen=True)
class FfaLora(Strategy):
    """start <- (A_0, mean of s B); one rank for all clients."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; exact, because A is the same everywhere."""
        return Properties(
            title="FFA-LoRA",
            source="ICLR 2024, arXiv 2403.12313",
            mixed_ranks=False,
            exact=True,
            reveals="the mean of B; with two clients, each other's B",
            sums_only=True,
            bytes_up="b r M",
            bytes_down="b r M",
            averages=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """A_0, which stays."""
        return GlobalModel(start=fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """B trains and travels; A is drawn on the site."""
        return LocalRule(trains="B", sends="B", receives="B")

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """A as it was, the mean of B."""
        assert model.start is not None
        average = mean(cohort.updates)
        start = Adapter({n: Factors(f.a, average[n].b, 1.0) for n, f in model.start.items()})
        return Aggregated(GlobalModel(merged=model.merged, start=start))
