"""The mean of the deltas as a dense matrix: the reference that exact methods must equal.

    merged <- merged + sum_k p_k s_k B_k A_k,   start <- none

Formed in float64 at full rank, by none of the algebra that the other methods rest on. The matrix
travels whole, as B = merged and A = I (or the other way round, whichever is smaller): what an
exact server would send that knew nothing of low rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Factors
from strategies.strategy import GlobalModel, Properties, Strategy, Update


@dataclass(frozen=True)
class Ideal(Strategy):
    """merged <- merged + the dense mean of the deltas."""

    @property
    def properties(self) -> Properties:
        """Exact by construction, at the price of dense matrices."""
        return Properties(
            title="Dense mean (reference)",
            source="the definition, as in arXiv 2409.05976, eq. 3",
            mixed_ranks=True,
            exact=True,
            reveals="the mean of the deltas; with two clients, each other's delta",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b min(m, n) D",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The bare base: each client draws its own factors."""
        return GlobalModel()

    def aggregate(self, model: GlobalModel, updates: Sequence[Update]) -> GlobalModel:
        """Add up the products."""
        modules = {}
        for name, (m, n) in updates[0].adapter.shapes.items():
            total = np.zeros((m, n))
            if model.merged is not None:
                total += _dense(model.merged[name])
            for update in updates:
                total += update.weight * _dense(update.adapter[name])
            dense = np.asarray(total, np.float32)
            if n <= m:
                modules[name] = Factors(np.eye(n, dtype=np.float32), dense, 1.0)
            else:
                modules[name] = Factors(dense, np.eye(m, dtype=np.float32), 1.0)
        return GlobalModel(merged=Adapter(modules))


def _dense(factors: Factors) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.asarray(factors.scale * (factors.b.astype(np.float64) @ factors.a.astype(np.float64)))
