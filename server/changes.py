"""What the clients of a round changed: how far, and how alike.

The change of a client is its trained delta less that of what it began from, which is `start` cut to
its rank. Norms of all clients, and inner products of any of them, come from Gram matrices of the
factors, module by module and in blocks, so that no change is ever formed as a matrix:

    <change_j, change_k> = <T_j, T_k> - <T_j, S_k> - <S_j, T_k> + <S_j, S_k>

with T_k what client k trained and S_k the first r_k directions of the start. The directions of the
start are the same for all; what of them a client saw is a partial sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.adapter import Adapter, Factors, same_shapes
from adapters.dense import BLOCK, DoubleArray, side_by_side
from strategies.noise import ROUNDING

ALL_COMPARED = 64
"""Up to so many clients any two are compared: 2,016 pairs."""
COMPARED = 48
"""Of more, so many by chance: 1,128 pairs."""


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes of a cohort, as a linear combination of factors that nobody has to multiply."""

    trained: Sequence[Adapter]
    began: Adapter | None
    """The start as the clients received it; None where each began from fresh factors."""
    ranks: Sequence[int]
    """How many directions of the start each client began from: more than came back, where it
    pruned."""

    def norms(self) -> DoubleArray:
        """||change_k||_F over all modules, (K,); 0 where it is rounding."""
        squares, sizes = np.zeros(len(self.trained)), np.zeros(len(self.trained))
        for name in self._names():
            start = self._start(name)
            seen = self._seen(name)
            within = start.products_within() if start else np.zeros((1, 1))
            for rows, block in self._blocks(name):
                own = block.squares()
                sizes[rows] += own
                squares[rows] += own + within[seen[rows], seen[rows]]
                if start:
                    across = block.products_with_directions_of(start)
                    squares[rows] -= 2.0 * across[np.arange(len(own)), seen[rows]]
        found = np.sqrt(np.maximum(squares, 0.0))
        return np.where(found > ROUNDING * np.sqrt(sizes), found, 0.0)

    def products(self) -> DoubleArray:
        """[j, k]: <change_j, change_k> over all modules, (K, K)."""
        total = np.zeros((len(self.trained), len(self.trained)))
        for name in self._names():
            start, seen = self._start(name), self._seen(name)
            for rows, block in self._blocks(name):
                total[rows, rows] += block.products_with(block)
                for columns, other in self._blocks(name, rows.stop):
                    found = block.products_with(other)
                    total[rows, columns] += found
                    total[columns, rows] += found.T
                if start:
                    across = block.products_with_directions_of(start)[:, seen]
                    total[rows] -= across
                    total[:, rows] -= across.T
            if start:
                total += start.products_within()[np.ix_(seen, seen)]
        return total

    def of(self, chosen: Sequence[int]) -> "Changes":
        """Those of these clients alone."""
        return Changes(
            [self.trained[k] for k in chosen], self.began, [self.ranks[k] for k in chosen]
        )

    def _names(self) -> list[str]:
        return list(same_shapes([*self.trained, *([] if self.began is None else [self.began])]))

    def _start(self, name: str) -> "_Block | None":
        return None if self.began is None else _Block([self.began[name]])

    def _seen(self, name: str) -> npt.NDArray[np.int64]:
        rank = 0 if self.began is None else self.began[name].rank
        return np.minimum(np.array(self.ranks, np.int64), rank)

    def _blocks(self, name: str, begin: int = 0) -> "Iterator[tuple[slice, _Block]]":
        """The clients' factors of this module, of about 1,024 directions at a time.

        begin: the first client of a block.
        """
        rank = 0
        for k, adapter in enumerate(self.trained[begin:], begin):
            rank += adapter[name].rank
            if rank >= BLOCK or k == len(self.trained) - 1:
                factors = [each[name] for each in self.trained[begin : k + 1]]
                yield slice(begin, k + 1), _Block(factors)
                begin, rank = k + 1, 0


class _Block:
    """The factors of some clients in one module, side by side."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.b, self.a = side_by_side([(f.scale, f) for f in factors])  # (R, m), (R, n)
        ranks = [f.rank for f in factors]
        self.ends = np.cumsum(np.array(ranks, np.int64))
        self.begins = self.ends - np.array(ranks, np.int64)
        self.one_rank = ranks[0] if len(set(ranks)) == 1 else 0

    def products_with(self, other: "_Block") -> DoubleArray:
        """[j, k]: inner products of these clients' deltas with those ones'."""
        terms = (self.b @ other.b.T) * (self.a @ other.a.T)
        return _sums(_sums(terms, self).T, other).T

    def products_with_directions_of(self, start: "_Block") -> DoubleArray:
        """[k, r]: of client k's delta with the first r directions of the start, r from 0 on."""
        terms = (self.b @ start.b.T) * (self.a @ start.a.T)
        return _partial_sums(_sums(terms, self))

    def products_within(self) -> DoubleArray:
        """[r, s]: of the first r directions with the first s, from 0 on."""
        terms = (self.b @ self.b.T) * (self.a @ self.a.T)
        return _partial_sums(_partial_sums(terms).T).T

    def squares(self) -> DoubleArray:
        """||delta||_F^2 of each client."""
        if self.one_rank:
            b, a = (half.reshape(-1, self.one_rank, half.shape[1]) for half in (self.b, self.a))
            terms = (b @ b.transpose(0, 2, 1)) * (a @ a.transpose(0, 2, 1))
            return np.asarray(terms.sum(axis=(1, 2)))
        found = np.zeros(len(self.ends))
        for k, rows in enumerate(map(slice, self.begins, self.ends)):
            b, a = self.b[rows], self.a[rows]
            found[k] = np.sum((b @ b.T) * (a @ a.T))
        return found


def _sums(terms: DoubleArray, block: _Block) -> DoubleArray:
    """Row k of the result: the sum of the rows of client k."""
    found = np.zeros((len(block.ends), terms.shape[1]))
    some = np.flatnonzero(block.ends > block.begins)  # reduceat gives no zeros for an empty range
    if len(some):
        found[some] = np.add.reduceat(terms, block.begins[some], axis=0)
    return found


def _partial_sums(terms: DoubleArray) -> DoubleArray:
    """[k, r]: the sum of the first r columns of row k, r from 0 to all."""
    return np.concatenate([np.zeros((len(terms), 1)), np.cumsum(terms, axis=1)], axis=1)


def inner_products_of_changes(
    trained: Sequence[Adapter], start: Adapter | None, ranks: Sequence[int] | None = None
) -> DoubleArray:
    """[j, k]: <change_j, change_k> over all modules.

    ranks: how many directions of the start each began from; by default those that came back.
    """
    return Changes(trained, start, ranks or [adapter.rank for adapter in trained]).products()


def compared(count: int, seed: int) -> list[int] | None:
    """Which of so many clients are compared with each other; None where all are.

    >>> compared(64, seed=1) is None, len(compared(65, seed=1))
    (True, 48)
    """
    if count <= ALL_COMPARED:
        return None
    chosen = np.random.default_rng(seed).choice(count, COMPARED, replace=False)
    return [int(k) for k in np.sort(chosen)]


def cosines(products: DoubleArray) -> DoubleArray:
    """Inner products -> cosines; 0 where a norm is 0, and 1 on the diagonal.

    >>> cosines(np.array([[4.0, 2.0], [2.0, 1.0]])).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    size = np.outer(norms, norms)
    found = np.divide(products, size, where=size > 0.0, out=np.zeros_like(products))
    np.fill_diagonal(found, 1.0)
    return np.asarray(np.clip(found, -1.0, 1.0))
