"""Algebra on deltas that never forms one: stack, inner product, norm, truncation, averaging.

For factors A (r, n), B (m, r) with scale s the delta is s B A (m, n). Everything below works on
matrices with r rows or columns; Gram matrices are float64.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.adapter import Adapter, Factors, same_shapes
from adapters.errors import AdapterError

CANCELLED = 1e-12
"""Share of the squares below which a difference of norms is only rounding."""
PROBES = 32


def stack(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """One adapter whose delta is exactly the weighted sum of the adapters' deltas.

    B = [w_1 s_1 B_1 | ... | w_K s_K B_K],  A = [A_1 ; ... ; A_K],  scale 1,
    so that B A = sum_k w_k s_k B_k A_k for any mix of ranks (FLoRA, arXiv 2409.05976, eq. 5, with
    each client's scale folded in). The rank is the sum of the ranks. Weights may be any finite
    numbers; [1, 1] adds, [1, -1] subtracts.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> both = stack([x, x], [0.25, 0.75])["q"]
    >>> both.rank, float((both.b @ both.a)[0, 0])
    (2, 2.0)
    """
    shapes = same_shapes(list(adapters))
    _one_weight_each(adapters, weights)
    modules = {}
    for name, (m, n) in shapes.items():
        parts = [adapter[name] for adapter in adapters]
        ranks = [part.rank for part in parts]
        a = np.empty((sum(ranks), n), np.float32)
        columns = np.empty((sum(ranks), m), np.float32)  # those of B, each in one piece
        at = 0
        for part, weight in zip(parts, weights, strict=True):
            block = slice(at, at + part.rank)
            a[block] = part.a
            np.multiply(part.b.T, np.float32(weight * part.scale), out=columns[block])
            at += part.rank
        modules[name] = Factors(a, columns.T, 1.0)
    return Adapter(modules)


def inner(x: Adapter, y: Adapter) -> float:
    """<x, y> = sum over modules of s_x s_y tr((B_x' B_y)(A_y A_x')), without a dense delta.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> inner(x, x)
    24.0
    """
    same_shapes([x, y])
    total = 0.0
    for name, left in x.items():
        right = y[name]
        gram_b = left.b.astype(np.float64).T @ right.b  # (r_x, r_y)
        gram_a = left.a.astype(np.float64) @ right.a.T  # (r_x, r_y)
        total += left.scale * right.scale * float(np.sum(gram_b * gram_a))
    return total


def module_norms(terms: Sequence[tuple[float, Adapter]]) -> dict[str, float]:
    """Module -> ||sum_i c_i delta_i||_F for a linear combination of adapters.

    From Gram matrices, sqrt(tr((B'B)(AA'))) over the joined factors. Where the terms cancel to less
    than 1e-6 of their size the squares have no digits left; there the norm is estimated to a few
    per cent from its action on 32 fixed random vectors, which cancel before they are squared.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> round(module_norms([(1.0, x), (-0.5, x)])["q"] ** 2, 6)
    6.0
    """
    shapes = same_shapes([adapter for _, adapter in terms])
    norms = {}
    for name in shapes:
        parts = [(c * adapter[name].scale, adapter[name]) for c, adapter in terms]
        b = np.concatenate([c * part.b.astype(np.float64) for c, part in parts], axis=1)
        a = np.concatenate([part.a.astype(np.float64) for _, part in parts], axis=0)
        products = (b.T @ b) * (a @ a.T)
        square, size = float(products.sum()), float(np.abs(products).sum())
        if square > CANCELLED * size:
            norms[name] = square**0.5
        else:
            probes = np.random.default_rng(0).standard_normal((a.shape[1], PROBES))
            norms[name] = float(np.linalg.norm(b @ (a @ probes))) / PROBES**0.5
    return norms


def norm(adapter: Adapter) -> float:
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


def relative_error(wanted: Sequence[Adapter], found: Sequence[Adapter]) -> float:
    """||sum_i delta(wanted_i) - sum_j delta(found_j)||_F / ||sum_i delta(wanted_i)||_F.

    0 where nothing is wanted, or only zeros.

    >>> x = Adapter({"q": Factors(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 2.0)})
    >>> relative_error([x, x], [x])
    0.5
    """
    whole = [(1.0, adapter) for adapter in wanted]
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

    The delta of this mean is not the mean of the deltas: the cross terms p_i p_j s_i B_i A_j are
    the aggregation noise of FedAvg. All ranks must be equal in each module.
    """
    shapes = same_shapes(list(adapters))
    _one_weight_each(adapters, weights)
    modules = {}
    for name, (m, n) in shapes.items():
        ranks = {adapter[name].rank for adapter in adapters}
        if len(ranks) != 1:
            raise AdapterError(
                f"factors average only at one rank; {name} comes with ranks {sorted(ranks)}"
            )
        (rank,) = ranks
        a, b = np.zeros((rank, n), np.float32), np.zeros((m, rank), np.float32)
        for adapter, weight in zip(adapters, weights, strict=True):
            a += np.float32(weight) * adapter[name].a
            b += np.float32(weight * adapter[name].scale) * adapter[name].b
        modules[name] = Factors(a, b, 1.0)
    return Adapter(modules)


def _one_weight_each(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if len(weights) != len(adapters) or not np.all(np.isfinite(weights)):
        raise AdapterError(
            f"expected one finite weight for each of {len(adapters)} adapters; got {list(weights)}"
        )
