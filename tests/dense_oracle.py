"""What the algebra must equal, computed the long way: dense (m, n) deltas in float64.

Nothing here calls the code under test: every number comes from the formula, from plain NumPy on
dense matrices, and from np.linalg.svd of the dense delta.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

import adapters.adapter
from adapters.adapter import Adapter, Delta, Factors, Form

Dense: TypeAlias = npt.NDArray[np.float64]
Deltas: TypeAlias = dict[str, Dense]


def double(values: npt.ArrayLike) -> Dense:
    """The same values in float64."""
    return np.asarray(values, np.float64)


def dense(factors: Form) -> Dense:
    """s B A, (m, n), or the matrix that is held."""
    if isinstance(factors, adapters.adapter.Dense):
        return double(factors.values)
    return double(factors.scale * np.einsum("mr,rn->mn", double(factors.b), double(factors.a)))


def dense_deltas(adapter: Delta | None, like: Delta | None = None) -> Deltas:
    """Module -> dense delta; for none zeros in the shapes of `like`."""
    if adapter is None:
        assert like is not None
        return {name: np.zeros(like[name].shape) for name in like}
    return {name: dense(factors) for name, factors in adapter.items()}


def dense_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Deltas:
    """Module -> sum_k w_k s_k B_k A_k."""
    return {
        name: sum(
            (w * dense(x[name]) for x, w in zip(adapters, weights, strict=True)),
            start=np.zeros(adapters[0][name].shape),
        )
        for name in adapters[0]
    }


def add(x: Deltas, y: Deltas, factor: float = 1.0) -> Deltas:
    """x + factor y, module by module."""
    assert list(x) == list(y)
    return {name: x[name] + factor * y[name] for name in x}


def frobenius(deltas: Deltas) -> float:
    """The norm over all modules: that of all entries in one long vector."""
    return float(np.linalg.norm(np.concatenate([delta.ravel() for delta in deltas.values()])))


def distance(x: Deltas, y: Deltas) -> float:
    """||x - y||_F over all modules."""
    return frobenius(add(x, y, -1.0))


def term_size(factors: Factors, weight: float = 1.0) -> float:
    """sum_j |w s| |b_j| |a_j|: the size of the rank-one terms before any of them cancel.

    Rounding is relative to this, and it is never below ||w s B A||.
    """
    columns = np.sqrt((double(factors.b) ** 2).sum(axis=0))
    rows = np.sqrt((double(factors.a) ** 2).sum(axis=1))
    return float(abs(weight * factors.scale) * (columns * rows).sum())


def singular_values(delta: Dense) -> Dense:
    """All min(m, n) of them, largest first."""
    return np.asarray(np.linalg.svd(delta, compute_uv=False))


def best_error(delta: Dense, rank: int) -> float:
    """||delta - its best approximation of this rank||_F (Eckart and Young, 1936)."""
    return float(np.sqrt(np.sum(singular_values(delta)[rank:] ** 2)))


def energy_kept(delta: Dense, rank: int) -> float:
    """The share of ||delta||_F^2 that the best approximation of this rank keeps."""
    squares = singular_values(delta) ** 2
    return float(squares[:rank].sum() / squares.sum())


def mean_of_padded_factors(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> Mapping[str, Dense]:
    """(sum_i p_i s_i pad(B_i)) (sum_j p_j pad(A_j)), written out as its K^2 products.

    Padding with zeros leaves of each product only the columns that both clients have:
    sum_ij p_i p_j s_i B_i[:, :q] A_j[:q] with q = min(r_i, r_j). At one rank it is plain FedAvg.
    """
    deltas = {}
    for name in adapters[0]:
        total = np.zeros(adapters[0][name].shape)
        for left, p_left in zip(adapters, weights, strict=True):
            for right, p_right in zip(adapters, weights, strict=True):
                q = min(left[name].rank, right[name].rank)
                product = double(left[name].b[:, :q]) @ double(right[name].a[:q])
                total += p_left * p_right * left[name].scale * product
        deltas[name] = total
    return deltas


def zero_deltas(pairs: Mapping[str, tuple[Dense, Dense]]) -> Deltas:
    """Module -> zeros (m, n), for factors (A, B) of these shapes."""
    return {name: np.zeros((len(b), a.shape[1])) for name, (a, b) in pairs.items()}


def leading(delta: Dense, rank: int) -> tuple[Dense, Dense, Dense]:
    """U (m, q), S (q,), V' (q, n): the first `rank` singular directions, those of zero left out."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    q = min(rank, int((s > 1e-6 * s[0]).sum()))
    return double(u[:, :q]), double(s[:q]), double(v[:q])
