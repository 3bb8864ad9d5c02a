"""FedSVD: B alone is trained and averaged, and now and then A becomes what was learned.

"FedSVD", arXiv 2505.12805.

    B <- sum_k p_k s_k B_k   (scale 1)
    every so many rounds   B A = U S V',   A <- V',   B <- U S

With one A for all, the mean of B is the mean of the deltas, as in FFA-LoRA; unlike there, A follows
what the clients learned, and its rows are orthonormal. The decomposition changes no delta. It is
small: B A = (B R') Q' with the QR decomposition A' = Q R, so that all r rows of V' are there, even
where B A has fewer directions.
"""

from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Factors
from settings.keys import key
from strategies.strategy import (
    Aggregated,
    Cohort,
    GlobalModel,
    Properties,
    Strategy,
    mean,
    whole_number,
)
from wire.rules import LocalRule

ROUNDS = "rounds"


@dataclass(frozen=True)
class FedSvd(Strategy):
    """start <- (A, mean of s B), and every so many rounds (V', U S) of their product."""

    every: int = key("Rounds from one decomposition to the next.", default=1, at_least=1)

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; exact, because A is the same everywhere."""
        return Properties(
            title="FedSVD",
            source="arXiv 2505.12805",
            mixed_ranks=False,
            exact=True,
            reveals="the mean of B; with two clients, each other's B",
            sums_only=True,
            bytes_up="b r M",
            bytes_down="b r D",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same A for every client."""
        return GlobalModel(start=fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """B trains and travels up; both travel down, for A changes."""
        return LocalRule(trains="B", sends="B")

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The mean of B, and where it is time the decomposition."""
        assert model.start is not None
        average, done = mean(cohort.updates), whole_number(model.state, ROUNDS, 0) + 1
        modules = {n: Factors(f.a, average[n].b, 1.0) for n, f in model.start.items()}
        if done % self.every == 0:
            modules = {name: decomposed(f) for name, f in modules.items()}
        return Aggregated(GlobalModel(model.merged, Adapter(modules), state={ROUNDS: done}))


def decomposed(f: Factors) -> Factors:
    """(U S, V') of B A, with all r rows of V' orthonormal; unchanged where B is zero."""
    if not f.b.any():
        return f
    q, r = np.linalg.qr(f.a.astype(np.float64).T)  # A' = Q R, (n, r) and (r, r)
    u, s, v = np.linalg.svd(f.scale * f.b.astype(np.float64) @ r.T, full_matrices=False)
    return Factors(np.asarray(v @ q.T, np.float32), np.asarray(u * s, np.float32), 1.0)
