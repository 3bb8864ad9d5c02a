"""The lossless rewriting of a delta at its lowest rank, and the best truncation of it.

A stack of clients has rank sum r, though its delta has rank at most min(sum r, m, n), and its
columns still tell which client they came from. `refactor` mends both; `compact` does where factors
are the smaller form.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from adapters.adapter import Adapter, Delta, Dense, Factors, Form, pays_dense
from adapters.dense import DoubleArray, matrix
from core.errors import AdapterError

SMALL = 128
"""Sides of a matrix up to which its decomposition is of no account."""
STEPS = 8
LOSSLESS_TAIL = 1e-7
"""Relative error that a lossless refactor may leave behind: float32 holds no more."""


@dataclass(frozen=True)
class Refactored:
    """What `refactor` returns: the adapter, its spectrum and the error that truncation made."""

    adapter: Adapter
    singular_values: Mapping[str, DoubleArray]
    """Module -> all singular values of the delta, largest first, those cut off included."""
    error: float
    """||delta - delta of the adapter||_F / ||delta||_F over all modules; at most 1e-7
    when lossless."""


def refactor(delta: Delta, energy: float = 1.0, rank: int | None = None) -> Refactored:
    """The same delta at the lowest rank, its columns sorted by singular value.

    With the singular value decomposition s B A = U S V', the result is B = U sqrt(S),
    A = sqrt(S) V', scale 1. It costs O((m + n) R^2 + R^3) for factors of rank R below mn / (m + n)
    and never forms the (m, n) matrix of these; for more, and for a dense module with q = min(m, n),
    O(m n q + q^3). The rank falls to at most min(R, m, n).

    energy: in (0, 1], the share of ||delta||_F^2 to keep in each module; 1.0 is lossless to
        float32 (what is dropped has relative norm of at most 1e-7). Where terms nearly cancel,
        about 1e-8 of the terms may be lost too.
    rank: keep at most this many directions in each module.

    Truncation is optimal (Eckart-Young): no adapter of the kept rank is nearer in Frobenius norm.

    >>> x = Adapter({"q": Factors(np.ones((5, 4), np.float32), np.ones((3, 5), np.float32), 1.0)})
    >>> refactor(x).adapter.rank        # five equal directions are one
    1
    """
    if not 0.0 < energy <= 1.0:
        raise AdapterError(f"energy must lie in (0, 1], where 1.0 is lossless; got {energy}")
    if rank is not None and rank < 1:
        raise AdapterError(f"the rank to keep must be at least 1; got {rank}")
    modules, spectra = {}, {}
    lost = total = 0.0
    for name, form in delta.items():
        left, values, right = _svd(form)
        squares = values**2
        tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # tail[k]: energy beyond k directions
        allowed = max(1.0 - energy, LOSSLESS_TAIL**2) * tail[0]
        keep = min(int(np.argmax(tail <= allowed)), form.rank)
        if rank is not None and keep > rank:
            keep = rank
        lost += tail[keep]
        total += tail[0]
        root = np.sqrt(values[:keep])
        a, b = root[:, None] * right[:keep], left[:, :keep] * root
        if _in_factors(form):  # in float64: small directions are differences of large columns
            a, b = a @ form.a, form.b @ b
        modules[name] = Factors(np.asarray(a, np.float32), np.asarray(b, np.float32), 1.0)
        spectra[name] = values
    return Refactored(Adapter(modules), spectra, float(np.sqrt(lost / total)) if total else 0.0)


def compact(delta: Delta, energy: float = 1.0) -> Delta:
    """The same delta, each module in the form that holds the fewer values: lowest rank or dense.

    No form tells one client's directions from another's. A dense module stays dense, unless
    `energy` below 1, as in `refactor`, cuts it to a rank below mn / (m + n).

    >>> x = Adapter({"q": Factors(np.ones((5, 9), np.float32), np.ones((9, 5), np.float32), 1.0)})
    >>> compact(x)["q"].shape, compact(x)["q"].rank
    ((9, 9), 9)
    """
    modules: dict[str, Form] = {}
    for name, form in delta.items():
        if energy == 1.0 and not _in_factors(form):
            modules[name] = form if isinstance(form, Dense) else _as_dense(form)
            continue
        lowest = refactor(Delta({name: form}), energy).adapter[name]
        dense = pays_dense(lowest.rank, lowest.shape)
        modules[name] = _as_dense(lowest) if dense else lowest
    return Delta(modules)


def leading(form: Dense, rank: int) -> tuple[Factors, DoubleArray]:
    """The first `rank` directions of a matrix, as `refactor` gives them, and their singular values.

    Of a large matrix they are found by eight steps of subspace iteration on twice as many vectors,
    from a fixed beginning. Where the spectrum falls these are the directions themselves; among
    directions of nearly equal strength others may be picked, which together hold nearly as much.
    """
    m, n = form.shape
    if min(m, n) <= SMALL or 4 * rank >= min(m, n):
        found = refactor(Delta({"": form}), rank=rank)
        return found.adapter[""], found.singular_values[""][:rank]
    if m > n:
        turned, values = leading(Dense(form.values.T), rank)
        return Factors(turned.b.T, turned.a.T, 1.0), values
    whole = form.values.astype(np.float64)
    width = 2 * rank + 8
    gram = whole @ whole.T if m <= 16 * width else None
    basis = np.random.default_rng(0).standard_normal((m, width))
    for _ in range(STEPS):
        image = gram @ basis if gram is not None else whole @ (whole.T @ basis)
        basis = _orthonormal(image @ np.linalg.eigh(basis.T @ image)[1])
    left, values, right = np.linalg.svd(basis.T @ whole, full_matrices=False)
    keep = int((values[:rank] > LOSSLESS_TAIL * np.linalg.norm(values)).sum())
    root = np.sqrt(values[:keep])
    a, b = root[:, None] * right[:keep], (basis @ left[:, :keep]) * root
    factors = Factors(np.asarray(a, np.float32), np.asarray(b, np.float32), 1.0)
    return factors, values[:keep]


def _orthonormal(columns: DoubleArray) -> DoubleArray:
    """An orthonormal basis of columns that are nearly orthogonal, whatever their lengths."""
    lengths = np.linalg.norm(columns, axis=0)
    live = lengths > np.finfo(np.float64).eps * lengths.max(initial=0.0)
    unit = columns[:, live] / lengths[live]
    return np.asarray(unit @ _whiten(unit.T @ unit)[0])


def as_factors(delta: Delta) -> Adapter:
    """The same delta as an adapter: what is dense in factors of full rank, the rest as it is."""
    return Adapter(
        {
            name: form if isinstance(form, Factors) else refactor(Delta({name: form})).adapter[name]
            for name, form in delta.items()
        }
    )


def _as_dense(factors: Factors) -> Dense:
    return Dense(np.asarray(matrix(factors), np.float32))


def _in_factors(form: Form) -> TypeGuard[Factors]:
    """Whether a decomposition of the factors is less work than one of the matrix."""
    return isinstance(form, Factors) and not pays_dense(form.rank, form.shape)


def _svd(form: Form) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Of factors what `_thin_svd` gives; of a matrix U (m, q), singular values (q,), V' (q, n)."""
    if not _in_factors(form):
        return _svd_of_matrix(matrix(form))
    return _thin_svd(form.b.T.astype(np.float64), form.a.astype(np.float64), form.scale)


def _svd_of_matrix(values: DoubleArray) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """U, S, V' with U S V' the matrix, to the last digit of float64.

    Of a larger one from the eigenvectors U of its smaller Gram matrix, at a third of the time: U U'
    is the identity whatever they are worth, and the rows of U' M are orthogonal, with the singular
    values as their lengths, to 1e-8 of the largest.
    """
    m, n = values.shape
    if min(m, n) <= SMALL:
        return np.linalg.svd(values, full_matrices=False)
    if m > n:
        left, singular, right = _svd_of_matrix(values.T)
        return right.T, singular, left.T
    vectors = np.linalg.eigh(values @ values.T)[1][:, ::-1]
    rows = vectors.T @ values
    singular = np.linalg.norm(rows, axis=1)
    order = np.argsort(-singular, kind="stable")
    vectors, rows, singular = vectors[:, order], rows[order], singular[order]
    unit = np.divide(rows, singular[:, None], where=singular[:, None] > 0.0, out=rows)
    return vectors, singular, unit


def spectrum_of_product(b: DoubleArray, a: DoubleArray) -> DoubleArray:
    """The singular values of B' A, largest first, for B (R, m) and A (R, n) with R below both."""
    return _thin_svd(b, a, 1.0)[1]


def _thin_svd(
    columns: DoubleArray, a: DoubleArray, scale: float
) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """X (R, k), singular values (k,), Y (k, R) with U = B X and V' = Y A, for s B A = U S V'.

    columns: those of B, (R, m).

    A thin QR of B and of A' and an SVD of the small core, with the two QRs replaced by
    eigendecompositions of float64 Gram matrices, B'B = V L V', which give the same orthonormal
    bases B V L^(-1/2) at the price of two matrix products. Squaring costs half the digits of
    float64, which leaves all the digits of float32. Each pair of column b_j and row a_j is first
    balanced to equal norms, so that no direction is lost to an uneven split between A and B.
    """
    gram_b, gram_a = columns @ columns.T, a @ a.T  # (R, R)
    norm_b, norm_a = np.sqrt(np.diag(gram_b)), np.sqrt(np.diag(gram_a))
    live = (norm_b > 0.0) & (norm_a > 0.0)
    balance = np.where(live, np.sqrt(np.divide(norm_a, norm_b, where=live, out=norm_a * 0)), 0.0)
    inverse = np.divide(1.0, balance, where=live, out=np.zeros_like(balance))
    basis_b, half_b = _whiten(balance[:, None] * gram_b * balance)
    basis_a, half_a = _whiten(inverse[:, None] * gram_a * inverse)
    core = scale * (half_b @ half_a.T)
    left, values, right = np.linalg.svd(core, full_matrices=False)
    keep = min(len(values), columns.shape[1], a.shape[1])
    x = balance[:, None] * (basis_b @ left[:, :keep])
    y = (right[:keep] @ basis_a.T) * inverse
    return x, values[:keep], y


def _whiten(gram: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """P (R, k), H (k, R) with (M P) orthonormal and M = (M P) H, from the Gram matrix M'M."""
    values, vectors = np.linalg.eigh(gram)
    live = values > np.finfo(np.float64).eps * max(values[-1:].sum(), 0.0)
    root = np.sqrt(values[live])
    return vectors[:, live] / root, root[:, None] * vectors[:, live].T


def singular_values(delta: Delta) -> dict[str, DoubleArray]:
    """Module -> the singular values of its delta, largest first, min(R, m, n) of them.

    Of a large matrix those below 1e-7 of the largest are not told from 0.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> round(float(singular_values(x)["q"][0] ** 2), 6)
    24.0
    """
    return {
        name: _svd(form)[1] if _in_factors(form) else spectrum(matrix(form))
        for name, form in delta.items()
    }


def spectrum(values: DoubleArray) -> DoubleArray:
    """The singular values of a matrix, largest first; of a large one those below 1e-7 are 0."""
    m, n = values.shape
    if min(m, n) <= SMALL:
        return np.asarray(np.linalg.svd(values, compute_uv=False))
    squares = np.linalg.eigvalsh(values @ values.T if m <= n else values.T @ values)[::-1]
    found = np.sqrt(np.maximum(squares, 0.0))
    return np.where(found > LOSSLESS_TAIL * found[:1], found, 0.0)


def effective_rank(singular_values: npt.ArrayLike) -> float:
    """Exp of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007).

    Between 1 (one direction) and the number of values (all equal); 0 for a zero delta.

    >>> effective_rank([1.0, 1.0, 0.0])
    2.0
    """
    values = np.asarray(singular_values, np.float64)
    if values.sum() <= 0.0:
        return 0.0
    shares = values[values > 0.0] / values.sum()
    return float(np.round(np.exp(-np.sum(shares * np.log(shares))), 12))
