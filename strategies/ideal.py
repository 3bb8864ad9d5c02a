"""The mean of the deltas as a dense matrix: the reference that exact methods must equal.

    merged <- merged + sum_k p_k s_k B_k A_k,   start <- none

Formed in float64 at full rank, by none of the algebra that the other methods rest on. The matrix
travels whole: what an exact server would send that knew nothing of low rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.adapter import Adapter, Delta, Dense, Form
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy


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
            bytes_down="b m n",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The bare base: each client draws its own factors."""
        return GlobalModel()

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Add up the products."""
        modules = {}
        for name in cohort.updates[0].adapter:
            b, a = [], []
            for update in cohort.updates:
                f = update.adapter[name]
                b.append(update.weight * f.scale * f.b.astype(np.float64))
                a.append(f.a.astype(np.float64))
            total = np.hstack(b) @ np.vstack(a)
            if model.merged is not None:
                total += _dense(model.merged[name])
            modules[name] = Dense(np.asarray(total, np.float32))
        return Aggregated(GlobalModel(merged=Delta(modules)))


def _dense(form: Form) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(form, Dense):
        return form.values.astype(np.float64)
    return np.asarray(form.scale * (form.b.astype(np.float64) @ form.a.astype(np.float64)))
