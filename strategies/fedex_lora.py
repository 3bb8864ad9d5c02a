"""FedEx-LoRA: FedAvg of the factors, and what that loses goes into the base.

Singhal, Ponkshe, Vepakomma: "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning
of Foundation Models", ACL 2025, arXiv 2410.09432.

    A <- sum_k p_k A_k,   B <- sum_k p_k s_k B_k   (scale 1)
    merged <- merged + sum_k p_k s_k B_k A_k - B A

The residual is written as sum_k p_k (s_k B_k - B)(A_k - A), which is the same, since the mean of
the differences is zero: rank K r, no difference of large terms, and exactly zero where all clients
agree. The authors form it densely and weigh all clients alike (clients.weights=uniform).
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Delta, Factors
from adapters.algebra import add, stack
from adapters.refactoring import compact
from adapters.terms import PLUS, Term
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean


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
            bytes_down="b (r D + min(S D, m n))",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The mean of each factor, and the residual."""
        start = mean(cohort.updates)
        residual: Delta = stack(
            [_difference(update.adapter, start) for update in cohort.updates],
            [update.weight for update in cohort.updates],
        )
        merged = residual
        if model.merged is not None:
            merged = add([model.merged, residual], [1.0, 1.0])
        return Aggregated(GlobalModel(compact(merged), start), gained=(Term(PLUS, residual),))


def _difference(adapter: Adapter, mean: Adapter) -> Adapter:
    """(s B - B_mean, A - A_mean), scale 1; the mean has scale 1."""
    modules = {}
    for name, f in adapter.items():
        b = np.float64(f.scale) * f.b - mean[name].b
        modules[name] = Factors(f.a - mean[name].a, np.asarray(b, np.float32), 1.0)
    return Adapter(modules)
