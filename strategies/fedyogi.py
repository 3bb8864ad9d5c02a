"""FedYogi: the server's own Yogi on the mean of what the clients moved.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive Federated Optimization",
ICLR 2021, arXiv 2003.00295, algorithm 2; here on LoRA factors.

    d = mean of the factors - start
    m <- beta1 m + (1 - beta1) d
    v <- v - (1 - beta2) d^2 sign(v - d^2)
    start <- start + eta m / (sqrt(v) + tau),   m = 0 and v = tau^2 before round one
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, FloatArray
from settings.keys import key
from strategies.server_step import method_under, properties_over, stepped
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy
from wire.rules import LocalRule

FIRST, SECOND = "first-moment", "second-moment"


@dataclass(frozen=True)
class FedYogi(Strategy):
    """start <- start + eta m / (sqrt(v) + tau)."""

    over: str = key("The method whose mean is the direction.", default="fedavg")
    rate: float = key("The server's learning rate, eta.", default=0.01, above=0)
    beta1: float = key("Share of the first moment that stays.", default=0.9, at_least=0, at_most=1)
    beta2: float = key("How slowly the second moment changes.", default=0.99, at_least=0, at_most=1)
    tau: float = key("How little the second moment can be.", default=1e-3, above=0)

    @property
    def properties(self) -> Properties:
        """Those of the method under it; not exact."""
        return properties_over(self._under, "FedYogi", "ICLR 2021, arXiv 2003.00295")

    @property
    def _under(self) -> Strategy:
        return method_under("fedyogi", self.over)

    def begin(self, fresh: Adapter) -> GlobalModel:
        """As the method under it."""
        return self._under.begin(fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """As the method under it."""
        return self._under.local_rule(model, client)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """A step of each value by its own size."""
        return stepped(self._under, model, cohort, self._step, {FIRST: 0.0, SECOND: self.tau**2})

    def _step(self, d: FloatArray, held: dict[str, FloatArray]) -> FloatArray:
        first, second = np.float32(self.beta1), np.float32(self.beta2)
        rate, tau, one = np.float32(self.rate), np.float32(self.tau), np.float32(1.0)
        held[FIRST] = m = first * held[FIRST] + (one - first) * d
        square, v = d * d, held[SECOND]
        held[SECOND] = v = v - (one - second) * square * np.asarray(np.sign(v - square), np.float32)
        return rate * m / (np.asarray(np.sqrt(v), np.float32) + tau)
