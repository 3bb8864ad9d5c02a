"""How far a method's round lies from the ideal one: the sum of what its clients changed.

    D_k                 client k's trained delta - the delta of what it began from
    ideal change        sum_k p_k D_k
    aggregation noise   ||(G_after - G_before) - ideal change||_F / ||ideal change||_F

Relative to what the round did, and not to what was accumulated before, so that methods compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from adapters.adapter import Adapter, Delta, Form, same_shapes
from adapters.algebra import as_few_factors, norm_of_product, total_norm, truncate
from adapters.dense import DoubleArray, side_by_side, summed
from adapters.refactoring import effective_rank, spectrum, spectrum_of_product
from strategies.strategy import Cohort, GlobalModel

Terms: TypeAlias = Sequence[tuple[float, Delta]]
"""A linear combination of deltas."""
ROUNDING = 1e-6
"""A change below this share of what was trained is the rounding of float32: none."""


def ideal_change(
    cohort: Cohort,
    began: Adapter | None,
    ranks: Sequence[int] | None = None,
) -> Terms:
    """sum_k p_k D_k, as a linear combination that nobody had to form yet.

    began: the start as the clients received it; None where each began from fresh factors.
    ranks: how many directions of it each client began from; by default those that came back.
        What they kept frozen is no change.
    """
    terms: list[tuple[float, Delta]] = [(1.0, cohort.total)]
    if began is None:
        return terms
    updates = cohort.updates
    ranks = [update.adapter.rank for update in updates] if ranks is None else ranks
    seen: dict[int, float] = {}
    for update, rank in zip(updates, ranks, strict=True):
        seen[min(rank, began.rank)] = seen.get(min(rank, began.rank), 0.0) + update.weight
    if cohort.frozen is not None:
        terms.append((-1.0, cohort.frozen))
    return [*terms, *((-weight, truncate(began, rank)) for rank, weight in sorted(seen.items()))]


@dataclass(frozen=True)
class Compared:
    """What a round did beside what it should have done."""

    noise: float | None
    """Aggregation noise; None where nothing changed."""
    relative_to_model: float | None
    """The same distance relative to ||G_after||: small wherever much was accumulated before."""
    modules: dict[str, float | None]
    """Aggregation noise of each module."""
    sizes: dict[str, float]
    """||ideal change||_F of each module; 0 where it is rounding."""
    effective_rank: float | None
    """Of the ideal change, its mean over modules; None where nothing changed."""

    @property
    def size(self) -> float:
        """||ideal change||_F over all modules."""
        return total_norm(self.sizes)


def compare(before: GlobalModel, after: GlobalModel, ideal: Terms) -> Compared:
    """The round from `before` to `after` against its ideal change.

    Rounding leaves a noise of about 1e-7 ||G|| / ||ideal change||. A change that is rounding
    itself, below 1e-6 of what it is a difference of, is none.
    """
    held = [part for part in (after.merged, after.start) if part is not None]
    left = [part for part in (before.merged, before.start) if part is not None]
    shapes = same_shapes([*held, *left, *(delta for _, delta in ideal)])
    distances, sizes, totals, ranks = {}, {}, {}, []
    for name, shape in shapes.items():
        change = [(c, delta[name]) for c, delta in ideal]
        now = [(1.0, part[name]) for part in held]
        moved = [*now, *((-1.0, part[name]) for part in left)]
        size, values, distances[name] = _compare_module(change, moved, shape)
        totals[name] = _norm(now, shape)
        terms = max(_norm([part], shape) for part in change) if len(change) > 1 else 0.0
        sizes[name] = size if size > ROUNDING * terms else 0.0
        ranks.append(effective_rank(values) if sizes[name] else 0.0)
    distance, size, total = map(total_norm, (distances, sizes, totals))
    return Compared(
        noise=distance / size if size else None,
        relative_to_model=distance / total if total else None,
        modules={n: distances[n] / sizes[n] if sizes[n] else None for n in shapes},
        sizes=sizes,
        effective_rank=float(np.mean(ranks)) if size else None,
    )


def _compare_module(
    change: Sequence[tuple[float, Form]],
    moved: Sequence[tuple[float, Form]],
    shape: tuple[int, int],
) -> tuple[float, DoubleArray, float]:
    """||change||_F, the singular values of the change, and ||moved - change||_F."""
    apart = [*moved, *((-c, form) for c, form in change)]
    factors, all_factors = as_few_factors(change), as_few_factors(apart)
    if factors is None:
        whole = summed(change, shape)
        distance = float(np.linalg.norm(summed(moved, shape) - whole))
        return float(np.linalg.norm(whole)), spectrum(whole), distance
    b, a = side_by_side(factors)
    if all_factors is None:
        distance = float(np.linalg.norm(summed(apart, shape)))
    else:
        distance = norm_of_product(*side_by_side(all_factors))
    return norm_of_product(b, a), spectrum_of_product(b, a), distance


def _norm(parts: Sequence[tuple[float, Form]], shape: tuple[int, int]) -> float:
    if not parts:
        return 0.0
    factors = as_few_factors(parts)
    if factors is None:
        return float(np.linalg.norm(summed(parts, shape)))
    return norm_of_product(*side_by_side(factors))
