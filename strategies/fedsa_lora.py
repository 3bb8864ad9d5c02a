"""FedSA-LoRA: A is averaged, B is each client's own and stays with it.

Guo, Zeng, Wang, Fan, Wang, Qu: "Selective Aggregation for Low-Rank Adaptation in Federated
Learning", ICLR 2025, arXiv 2410.01463.

    A <- sum_k p_k A_k;   client k goes on with A and its own B_k

Both factors train, A alone travels. There is no global model: each client's is W + s_k B_k A, and
what it is worth is told by the clients' own held-out parts. A client that is new begins with B = 0.
A classifier's head stays with its client too, as in the authors' runs on GLUE, which keep `lora_B`
and `classifier` local.
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Factors
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean
from wire.rules import LocalRule


@dataclass(frozen=True)
class FedSaLora(Strategy):
    """start <- (mean of A, B = 0); one rank for all clients."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; personal."""
        return Properties(
            title="FedSA-LoRA",
            source="ICLR 2025, arXiv 2410.01463",
            mixed_ranks=False,
            exact=False,
            reveals="the mean of A; with two clients, each other's A",
            sums_only=True,
            bytes_up="b r N",
            bytes_down="b r N",
            averages=True,
            personal=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same A for every client."""
        return GlobalModel(start=fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """Both factors train, A alone travels."""
        return LocalRule(sends="A", receives="A", keeps_b=True, keeps_head=True)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The mean of A."""
        average = mean(cohort.updates)
        modules = {n: Factors(f.a, np.zeros_like(f.b), 1.0) for n, f in average.items()}
        return Aggregated(GlobalModel(merged=model.merged, start=Adapter(modules)))
