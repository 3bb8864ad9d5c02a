"""FedAvgM: the server goes on in the direction of the rounds before.

Hsu, Qi, Brown: "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv 1909.06335; here on LoRA factors.

    d = mean of the factors - start
    m <- beta m + d,   start <- start + eta m

beta = 0 and eta = 1 is the method under it.
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, FloatArray
from settings.keys import key
from strategies.server_step import method_under, properties_over, stepped
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy
from wire.rules import LocalRule

MOMENTUM = "momentum"


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """start <- start + eta m."""

    over: str = key("The method whose mean is the direction.", default="fedavg")
    beta: float = key("Share of the momentum that stays.", default=0.5, at_least=0, at_most=1)
    rate: float = key("The server's learning rate, eta.", default=1.0, above=0)

    @property
    def properties(self) -> Properties:
        """Those of the method under it; not exact."""
        return properties_over(self._under, "FedAvgM", "arXiv 1909.06335")

    @property
    def _under(self) -> Strategy:
        return method_under("fedavgm", self.over)

    def begin(self, fresh: Adapter) -> GlobalModel:
        """As the method under it."""
        return self._under.begin(fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """As the method under it."""
        return self._under.local_rule(model, client)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """A step along the momentum."""
        return stepped(self._under, model, cohort, self._step, {MOMENTUM: 0.0})

    def _step(self, d: FloatArray, held: dict[str, FloatArray]) -> FloatArray:
        held[MOMENTUM] = np.float32(self.beta) * held[MOMENTUM] + d
        return np.float32(self.rate) * held[MOMENTUM]
