"""FLoRA-NA: one pair of factors, mixed from the clients' so that its product is nearly the mean.

Nguyen, Nguyen, Jeong, Le, Pham: "Communication-Efficient and Accurate Approach for Aggregation in
Federated Low-Rank Adaptation", arXiv 2509.26399.

    B = sum_k x_k s_k B_k,   A = sum_k y_k A_k   (scale 1), for each module with
    x, y = argmin ||sum_k p_k s_k B_k A_k - B A||_F

The mixtures cost what FedAvg's means cost on the wire. The objective is that of the paper; here x
and y are solved for in turn, each by least squares over inner products of the factors, beginning
from x = y = p, which is FedAvg. No step can make it worse. Differences: a public implementation
mixes updates instead of factors (A_0 + sum_k y_k dA_k), has one x and one y for all modules, and
finds them by AdamW; its distance from the ideal is level with that of this file. Where no client
moved a module, its means stay: x = y = 0 would leave nothing to train.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters.adapter import Adapter, Factors
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean

SWEEPS = 10


@dataclass(frozen=True)
class FloraNa(Strategy):
    """start <- the mixtures of the factors whose product is nearest to the mean of the deltas."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; nearer than FedAvg, not exact."""
        return Properties(
            title="FLoRA-NA",
            source="arXiv 2509.26399",
            mixed_ranks=False,
            exact=False,
            reveals="mixtures of the factors; with two clients, nearly each other's",
            sums_only=False,
            bytes_up="b r D",
            bytes_down="b r D",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Mix the factors of each module."""
        updates = cohort.updates
        weights = np.array([update.weight for update in updates])
        modules = {}
        for name, average in mean(updates).items():
            factors = [update.adapter[name] for update in updates]
            moved = any(f.b.any() for f in factors)
            modules[name] = mixed(factors, weights) if moved else average
        return Aggregated(GlobalModel(merged=model.merged, start=Adapter(modules)))


def mixed(factors: Sequence[Factors], weights: Any) -> Factors:
    """The mixture of these factors nearest to sum_k p_k s_k B_k A_k that ten sweeps find."""
    a = np.stack([f.a.astype(np.float64) for f in factors])  # (K, r, n)
    b = np.stack([f.scale * f.b.astype(np.float64).T for f in factors])  # (K, r, m)
    gram_a, gram_b = _gram(a), _gram(b)
    x = y = weights
    for _ in range(SWEEPS):
        x = _solve(gram_b, gram_a, y, weights)
        y = _solve(gram_a, gram_b, x, weights)
    return Factors(
        np.asarray(np.tensordot(y, a, 1), np.float32),
        np.asarray(np.tensordot(x, b, 1).T, np.float32),
        1.0,
    )


def _gram(rows: Any) -> Any:
    """[i, j, p, q]: row p of client i against row q of client j, as one piece of memory."""
    clients, rank, width = rows.shape
    flat = rows.reshape(clients * rank, width)
    gram = (flat @ flat.T).reshape(clients, rank, clients, rank)
    return np.ascontiguousarray(gram.transpose(0, 2, 1, 3))


def _solve(gram: Any, gram_other: Any, other: Any, weights: Any) -> Any:
    """The best coefficients of one factor while those of the other stand.

    sum_ij x_i y_j <F_i G_j> against sum_l p_l <F_l G_l>: normal equations in x.
    """
    clients, rank = gram.shape[0], gram.shape[2]
    mixed_cross = other @ gram_other.reshape(clients, clients, rank * rank)  # (l, p q)
    mixed_square = other @ mixed_cross  # (p q,)
    matrix = (gram.reshape(-1, rank * rank) @ mixed_square).reshape(clients, clients)
    turned = mixed_cross.reshape(clients, rank, rank).transpose(0, 2, 1)
    wanted = gram.reshape(clients, -1) @ (weights[:, None, None] * turned).ravel()
    return np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0]
