"""What an aggregation method is: a value for the global model, and a rule that makes the next.

    global model after a round:   W + delta(merged) + delta(start)

`merged` is frozen and cumulative: clients add it to their base. `start` is what they go on
training from; without one each client draws fresh factors (A random, B zero).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.adapter import Adapter
from adapters.algebra import module_norms, stack, total_norm


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """What the server holds between two rounds, apart from bookkeeping."""

    merged: Adapter | None = None
    start: Adapter | None = None

    def total(self) -> Adapter | None:
        """Merged + start as one adapter; None while the global model is the base itself."""
        parts = [part for part in (self.merged, self.start) if part is not None]
        return stack(parts, [1.0] * len(parts)) if parts else None


@dataclass(frozen=True, eq=False)
class Update:
    """One client's admitted reply."""

    client: str
    weight: float
    """p_k, in (0, 1]; the weights of a round sum to 1."""
    adapter: Adapter


@dataclass(frozen=True)
class Properties:
    """What a method promises; the contract tests hold it to this."""

    title: str
    source: str
    mixed_ranks: bool
    """Clients may train different ranks."""
    exact: bool
    """The new global model is exactly the one before plus sum_k p_k s_k B_k A_k."""
    reveals: str
    """What one client can learn of another client's adapter from what the server sends."""


class Strategy(Protocol):
    """An aggregation method. Immutable; all that changes is in the GlobalModel."""

    @property
    def properties(self) -> Properties:
        """What this method promises."""
        ...

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The global model before round one; its delta is zero.

        fresh: factors drawn from the run's seed at the largest rank of any client (A random, B
        zero), for methods whose clients must begin alike.
        """
        ...

    def aggregate(self, model: GlobalModel, updates: Sequence[Update]) -> GlobalModel:
        """The next global model from this one and at least one client's trained factors.

        The caller passes updates in a fixed order, with weights that sum to 1.
        """
        ...


def ideal_increment(updates: Sequence[Update]) -> Adapter:
    """sum_k p_k s_k B_k A_k as a stack: what a noiseless server adds to W + delta(merged)."""
    return stack([update.adapter for update in updates], [update.weight for update in updates])


ROUNDING = 1e-6
"""A distance below this share of ||merged|| is rounding: merged is held in float32."""


@dataclass(frozen=True)
class Noise:
    """How far a method's new global model lies from the ideal one, relative to the increment."""

    total: float
    modules: dict[str, float]


def aggregation_noise(before: GlobalModel, after: GlobalModel, increment: Adapter) -> Noise:
    """||global_after - ideal||_F / ||increment||_F.

    ideal = W + delta(merged_before) + increment.

    increment: `ideal_increment` of the round. Where it is zero, the noise is 0 if the distance is
    zero too (to rounding) and infinite if it is not. Rounding leaves about 1e-7 of
    ||global_after|| / ||increment||.
    """
    terms = [(-1.0, increment)]
    terms += [(-1.0, before.merged)] if before.merged is not None else []
    terms += [(1.0, part) for part in (after.merged, after.start) if part is not None]
    distance, size = module_norms(terms), module_norms([(1.0, increment)])
    held = dict.fromkeys(size, 0.0)
    if before.merged is not None:
        held = module_norms([(1.0, before.merged)])
    return Noise(
        total=_ratio(total_norm(distance), total_norm(size), total_norm(held)),
        modules={name: _ratio(distance[name], size[name], held[name]) for name in size},
    )


def _ratio(distance: float, size: float, held: float) -> float:
    if size > 0.0:
        return distance / size
    return 0.0 if distance <= ROUNDING * held else float("inf")
