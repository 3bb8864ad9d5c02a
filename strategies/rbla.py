"""RBLA: each direction is averaged over those clients that have it.

Chen, Tavallaie, Nazemi, Zomaya: "RBLA: Rank-Based-LoRA-Aggregation for Fine-tuning Heterogeneous
Models in FLaaS", arXiv 2408.08699.

    A[j] <- sum_{k: r_k > j} p_k A_k[j] / sum_{k: r_k > j} p_k,   B[:, j] likewise with s_k B_k

for each direction j counted from 0. So nothing is diluted by zeros, but the last directions are
those of few clients. A direction that nobody in the cohort trains stays as it was. RB-LoRA, a
later work of the same kind, also sorts the result by singular values; this file does not.
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Factors
from strategies.padding import largest_rank
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy


@dataclass(frozen=True)
class Rbla(Strategy):
    """start <- the mean of each direction over the clients that have it."""

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; not exact."""
        return Properties(
            title="RBLA",
            source="arXiv 2408.08699",
            mixed_ranks=True,
            exact=False,
            reveals="the mean of the factors; above all others' ranks, a client's own rows",
            sums_only=True,
            bytes_up="b r_k D",
            bytes_down="b R D",
            averages=True,
            keeps_untouched=True,
            weighs_anew="each direction is averaged over those alone that have it, so that the "
            "only client of the largest rank has weight 1 in its last directions",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client, at the largest rank."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Direction by direction."""
        updates = cohort.updates
        rank = largest_rank(model, updates)
        modules = {}
        for name, (m, n) in updates[0].adapter.shapes.items():
            a, b = np.zeros((rank, n)), np.zeros((m, rank))
            if model.start is not None:
                old = model.start[name]
                a[: old.rank], b[:, : old.rank] = old.a, old.b * np.float64(old.scale)
            having = np.array([np.arange(rank) < u.adapter[name].rank for u in updates])  # (K, R)
            shares = np.array([[update.weight] for update in updates]) * having
            totals = shares.sum(axis=0)
            trained = totals > 0.0
            shares = np.divide(shares, totals, where=trained, out=shares)
            a[trained], b[:, trained] = 0.0, 0.0
            for update, share in zip(updates, shares, strict=True):
                f = update.adapter[name]
                a[: f.rank] += share[: f.rank, None] * f.a
                b[:, : f.rank] += (share[: f.rank] * f.scale) * f.b
            modules[name] = Factors(a.astype(np.float32), b.astype(np.float32), 1.0)
        return Aggregated(GlobalModel(merged=model.merged, start=Adapter(modules)))
