"""FedRot-LoRA: clients' factors are turned to lie alike before they are averaged.

"FedRot-LoRA", arXiv 2602.23638.

    R_k = U V'   of A_k A' = U S V' in one round, of (s_k B_k)' B in the next: the orthogonal matrix
                 that brings R_k' A_k, or s_k B_k R_k, nearest to the A, or B, before
    A <- sum_k p_k R_k' A_k,   B <- sum_k p_k s_k B_k R_k   (scale 1)

B A has as many pairs of factors as there are invertible r x r matrices, and a mean of factors that
are turned against each other has cross terms that no client trained. Turning changes no client's
delta, since R R' = I. A has the first turn, for B is zero before round one.
"""

from dataclasses import dataclass, replace

import numpy as np

from adapters.adapter import Adapter, Factors
from strategies.strategy import (
    Aggregated,
    Cohort,
    GlobalModel,
    Properties,
    Strategy,
    check_one_rank,
    mean,
)

TURN = "turn"
OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class FedRotLora(Strategy):
    """start <- the mean of the factors, each client's turned to lie like the start."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; nearer than FedAvg, not exact."""
        return Properties(
            title="FedRot-LoRA",
            source="arXiv 2602.23638",
            mixed_ranks=False,
            exact=False,
            reveals="the mean of the turned factors; with two clients, nearly each other's",
            sums_only=False,
            bytes_up="b r D",
            bytes_down="b r D",
            averages=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client."""
        return GlobalModel(start=fresh, state={TURN: "A"})

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Turn, then the weighted mean of each factor."""
        assert model.start is not None
        check_one_rank(cohort.updates)
        start, turn = model.start, str(model.state[TURN])
        turned = [
            replace(
                u, adapter=Adapter({n: _turned(u.adapter[n], f, turn) for n, f in start.items()})
            )
            for u in cohort.updates
        ]
        return Aggregated(GlobalModel(model.merged, mean(turned), state={TURN: OTHER[turn]}))


def _turned(f: Factors, like: Factors, turn: str) -> Factors:
    """The same delta, its factors turned towards those of `like`."""
    a, b = f.a.astype(np.float64), f.b.astype(np.float64)
    if turn == "A":
        u, _, v = np.linalg.svd(a @ like.a.astype(np.float64).T)
    else:
        u, _, v = np.linalg.svd(b.T @ like.b.astype(np.float64))
    rotation = u @ v  # (r, r)
    return Factors(
        np.asarray(rotation.T @ a, np.float32), np.asarray(b @ rotation, np.float32), f.scale
    )
