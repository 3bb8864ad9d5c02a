"""What a client trains from: what its rank and its method let it see of the global model."""

from collections.abc import Mapping

import numpy as np

from adapters.adapter import Adapter, Delta, Factors, FloatArray, Shapes, draw
from adapters.algebra import add, beyond, rescale, truncate


def starting_factors(
    start: Adapter | None, shapes: Shapes, rank: int, scale: float, seed: int
) -> Adapter:
    """What a client of this rank trains from, at its own scale.

    The first `rank` rows of A and columns of B of `start`; what is missing up to its rank, or
    everything where there is no start, is fresh (A random from the seed, B zero), so that the delta
    is that of the truncated start. So is a direction that is zero in both A and B, which no
    gradient would ever move: averages of padded factors leave such ones behind.
    """
    fresh = draw(shapes, rank, seed, scale)
    if start is None:
        return fresh
    modules = {}
    for name, own in rescale(truncate(start, rank), scale).items():
        rest = fresh[name]
        dead = np.logical_not(own.a.any(axis=1) | own.b.any(axis=0))  # (r,)
        modules[name] = Factors(
            np.concatenate(
                [np.where(dead[:, None], rest.a[: own.rank], own.a), rest.a[own.rank :]]
            ),
            np.concatenate([own.b, rest.b[:, own.rank :]], axis=1),
            scale,
        )
    return Adapter(modules)


def with_frozen_tail(merged: Delta | None, start: Adapter, rank: int) -> Delta | None:
    """Merged, and the directions of start beyond this rank."""
    if start.rank <= rank:
        return merged
    tail = beyond(start, rank)
    return tail if merged is None else add([merged, tail], [1.0, 1.0])


def with_own_b(adapter: Adapter, own: Mapping[str, FloatArray]) -> Adapter:
    """The adapter with the B that this client kept, where it has one of this shape."""
    modules = {}
    for name, f in adapter.items():
        kept = own.get(name)
        fits = kept is not None and kept.shape == f.b.shape
        modules[name] = Factors(f.a, kept if fits and kept is not None else f.b, f.scale)
    return Adapter(modules)
