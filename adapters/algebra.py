"""Algebra on deltas in their cheapest form: sum, inner product, norm, truncation, averaging.

For factors A (r, n), B (m, r) with scale s the delta is s B A (m, n). While the ranks in a sum are
below mn / (m + n), everything works on matrices with r rows or columns; from there on the matrix
itself is the smaller form and the less work, and is used. Sums and Gram matrices are float64.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.adapter import Adapter, Delta, Dense, Factors, Form, pays_dense, same_shapes
from adapters.dense import DoubleArray, matrix, side_by_side, summed
from core.errors import AdapterError

CANCELLED = 1e-12
"""Share of the squares below which a difference of norms is only rounding."""
PROBES = 32


def add(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """sum_i w_i delta_i, each module in the form that holds the fewer values.

    Factors whose ranks sum up to less than mn / (m + n) are stacked, which is exact; otherwise, and
    where any of them is dense, the matrix is summed in float64 and held in float32. Weights may be
    any finite numbers; [1, 1] adds, [1, -1] subtracts.

    >>> x = Adapter({"q": Factors(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> add([x], [0.5])["q"].rank, add([x, x], [0.25, 0.75])["q"].values[0].tolist()
    (1, [2.0, 2.0, 2.0, 2.0])
    """
    shapes = same_shapes(deltas)
    _one_weight_each(deltas, weights)
    modules: dict[str, Form] = {}
    for name, shape in shapes.items():
        parts = [(w, delta[name]) for delta, w in zip(deltas, weights, strict=True)]
        modules[name] = _stacked(parts) or Dense(np.asarray(summed(parts, shape), np.float32))
    return Delta(modules)


def _stacked(parts: Sequence[tuple[float, Form]]) -> Factors | None:
    """The parts side by side; None where that is not the smaller form."""
    factors = as_few_factors(parts)
    return None if factors is None else _side_by_side(factors)


def _side_by_side(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """B and A in float32; the coefficients hold each part's scale."""
    (m, n), rank = parts[0][1].shape, sum(part.rank for _, part in parts)
    a = np.empty((rank, n), np.float32)
    columns = np.empty((rank, m), np.float32)  # those of B, each in one piece
    at = 0
    for weight, part in parts:
        block = slice(at, at + part.rank)
        a[block] = part.a
        factor = np.float64(weight)  # rounding it first would bias every value
        np.multiply(part.b.T, factor, out=columns[block], dtype=np.float64, casting="same_kind")
        at += part.rank
    return Factors(a, columns.T, 1.0)


def stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter whose delta is exactly the weighted sum of the adapters' deltas.

    B = [w_1 s_1 B_1 | ... | w_K s_K B_K],  A = [A_1 ; ... ; A_K],  scale 1,
    so that B A = sum_k w_k s_k B_k A_k for any mix of ranks (FLoRA, arXiv 2409.05976, eq. 5, with
    each client's scale folded in). The rank is the sum of the ranks, however large that is; `add`
    is the same sum in its cheapest form.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> both = stack([x, x], [0.25, 0.75])["q"]
    >>> both.rank, float((both.b @ both.a)[0, 0])
    (2, 2.0)
    """
    shapes = same_shapes(adapters)
    _one_weight_each(adapters, weights)
    return Adapter(
        {
            name: _side_by_side(
                [(w * x[name].scale, x[name]) for x, w in zip(adapters, weights, strict=True)]
            )
            for name in shapes
        }
    )


def inner(x: Delta, y: Delta) -> float:
    """<x, y> = sum over modules of s_x s_y tr((B_x' B_y)(A_y A_x')), where neither is dense.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> inner(x, x)
    24.0
    """
    same_shapes([x, y])
    total = 0.0
    for name, left in x.items():
        right = y[name]
        if isinstance(left, Factors) and isinstance(right, Factors):
            gram_b = left.b.astype(np.float64).T @ right.b  # (r_x, r_y)
            gram_a = left.a.astype(np.float64) @ right.a.T  # (r_x, r_y)
            total += left.scale * right.scale * float(np.sum(gram_b * gram_a))
        else:
            total += float(np.sum(matrix(left) * matrix(right)))
    return total


def module_norms(terms: Sequence[tuple[float, Delta]]) -> dict[str, float]:
    """Module -> ||sum_i c_i delta_i||_F for a linear combination of deltas.

    Of the matrix, where their ranks sum up to mn / (m + n) or one is dense. Otherwise from Gram
    matrices, sqrt(tr((B'B)(AA'))) over the joined factors. Where the terms cancel to less than 1e-6
    of their size the squares have no digits left; there the norm is estimated to a few per cent
    from its action on 32 fixed random vectors, which cancel before they are squared.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> round(module_norms([(1.0, x), (-0.5, x)])["q"] ** 2, 6)
    6.0
    """
    shapes = same_shapes([delta for _, delta in terms])
    norms = {}
    for name, shape in shapes.items():
        parts = [(c, delta[name]) for c, delta in terms]
        factors = as_few_factors(parts)
        if factors is None:
            norms[name] = float(np.linalg.norm(summed(parts, shape)))
        else:
            norms[name] = norm_of_product(*side_by_side(factors))
    return norms


def as_few_factors(parts: Sequence[tuple[float, Form]]) -> list[tuple[float, Factors]] | None:
    """The parts of one module's sum, each coefficient with its scale; None where dense is less."""
    factors = [(c * form.scale, form) for c, form in parts if isinstance(form, Factors)]
    rank = sum(form.rank for _, form in factors)
    if len(factors) < len(parts) or pays_dense(rank, parts[0][1].shape):
        return None
    return factors


def norm_of_product(b: DoubleArray, a: DoubleArray) -> float:
    """||B' A||_F of B (R, m) and A (R, n), as `module_norms` says."""
    products = (b @ b.T) * (a @ a.T)
    square, size = float(products.sum()), float(np.abs(products).sum())
    if square > CANCELLED * size:
        return float(np.sqrt(square))
    probes = np.random.default_rng(0).standard_normal((a.shape[1], PROBES))
    return float(np.linalg.norm(b.T @ (a @ probes)) / np.sqrt(PROBES))


def norm(adapter: Delta) -> float:
    """||delta||_F over all modules, the root of the sum of their squares.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> round(norm(x) ** 2, 6)
    24.0
    """
    return total_norm(module_norms([(1.0, adapter)]))


def total_norm(norms: Mapping[str, float]) -> float:
    """The norm over all modules from the norms of each.

    >>> total_norm({"q": 3.0, "v": 4.0})
    5.0
    """
    return float(np.sqrt(sum(value**2 for value in norms.values())))


def relative_error(wanted: Sequence[Delta], found: Sequence[Delta]) -> float:
    """||sum_i delta(wanted_i) - sum_j delta(found_j)||_F / ||sum_i delta(wanted_i)||_F.

    0 where nothing is wanted, or only zeros.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> relative_error([x, x], [x])
    0.5
    """
    whole: list[tuple[float, Delta]] = [(1.0, adapter) for adapter in wanted]
    size = total_norm(module_norms(whole)) if whole else 0.0
    if size == 0.0:
        return 0.0
    return total_norm(module_norms(whole + [(-1.0, adapter) for adapter in found])) / size


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The first `rank` rows of A and columns of B of every module; lower ranks stay as they are.

    Where the columns are sorted by singular value this is the best approximation of that rank.
    """
    return Adapter(
        {name: Factors(f.a[:rank], f.b[:, :rank], f.scale) for name, f in adapter.items()}
    )


def beyond(adapter: Adapter, rank: int) -> Adapter:
    """What `truncate` cuts off: the rows of A and columns of B from `rank` on."""
    return Adapter(
        {name: Factors(f.a[rank:], f.b[:, rank:], f.scale) for name, f in adapter.items()}
    )


def with_row_norm(adapter: Adapter, norm: float) -> Adapter:
    """The same delta with every row of A scaled to this norm, and B's columns the other way.

    A row of zeros stays.

    >>> x = Adapter({"q": Factors(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32), 1.0)})
    >>> with_row_norm(x, 1.0)["q"].b.tolist()
    [[2.0], [2.0], [2.0]]
    """
    modules = {}
    for name, f in adapter.items():
        rows = np.linalg.norm(f.a, axis=1)
        factor = np.asarray(np.where(rows > 0.0, rows / norm, 1.0), np.float32)
        modules[name] = Factors(f.a / factor[:, None], f.b * factor, f.scale)
    return Adapter(modules)


def balanced_at(adapter: Adapter, scale: float) -> Adapter:
    """The same delta, with sqrt(scale) moved from A to B.

    Written at this scale, as a client does, A and B are then as large as each other where they are
    so here at scale 1.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 1.0)})
    >>> written = rescale(balanced_at(x, 4.0), 4.0)["q"]
    >>> float(written.a[0, 0]), float(written.b[0, 0])
    (0.5, 0.5)
    """
    root = np.float32(scale**0.5)
    return Adapter({n: Factors(f.a / root, f.b * root, f.scale) for n, f in adapter.items()})


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Zero rows of A and zero columns of B up to `rank`: the delta does not change.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> pad(x, 4)["q"].a.shape
    (4, 2)
    """
    modules = {}
    for name, f in adapter.items():
        if f.rank > rank:
            raise AdapterError(f"{name} has rank {f.rank}: it cannot be padded to rank {rank}")
        if f.rank == rank:
            modules[name] = f
            continue
        rows = ((0, rank - f.rank), (0, 0))
        modules[name] = Factors(np.pad(f.a, rows), np.pad(f.b, rows[::-1]), f.scale)
    return Adapter(modules)


def rescale(adapter: Adapter, scale: float) -> Adapter:
    """The same delta written with another scale: B becomes (s / scale) B; A stays.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> float(rescale(x, 0.5)["q"].b[0, 0])
    4.0
    """
    if not np.isfinite(scale) or scale <= 0.0:
        raise AdapterError(f"a scale must be finite and above zero; got {scale}")
    return Adapter(
        {n: Factors(f.a, f.b * np.float32(f.scale / scale), scale) for n, f in adapter.items()}
    )


def mean_of_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """A = sum_k p_k A_k and B = sum_k p_k s_k B_k, scale 1: each factor averaged on its own.

    Summed in float64 and rounded once, so that the mean of equal factors is exactly they.

    The delta of this mean is not the mean of the deltas: the cross terms p_i p_j s_i B_i A_j are
    the aggregation noise of FedAvg. All ranks must be equal in each module.
    """
    shapes = same_shapes(adapters)
    _one_weight_each(adapters, weights)
    modules = {}
    for name, (m, n) in shapes.items():
        ranks = {adapter[name].rank for adapter in adapters}
        if len(ranks) != 1:
            raise AdapterError(
                f"factors average only at one rank; {name} comes with ranks {sorted(ranks)}"
            )
        (rank,) = ranks
        a, b = np.zeros((rank, n)), np.zeros((m, rank))
        for adapter, weight in zip(adapters, weights, strict=True):
            f = adapter[name]
            a += np.float64(weight) * f.a
            b += np.float64(weight * f.scale) * f.b
        modules[name] = Factors(a.astype(np.float32), b.astype(np.float32), 1.0)
    return Adapter(modules)


def _one_weight_each(adapters: Sequence[Delta], weights: Sequence[float]) -> None:
    if len(weights) != len(adapters) or not np.all(np.isfinite(weights)):
        raise AdapterError(
            f"expected one finite weight for each of {len(adapters)} adapters; got {list(weights)}"
        )
