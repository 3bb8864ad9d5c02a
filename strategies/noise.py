"""How far a method's global model lies from the ideal one, without a dense matrix."""

from dataclasses import dataclass

from adapters.adapter import Delta
from adapters.algebra import module_norms, total_norm
from strategies.strategy import GlobalModel

ROUNDING = 1e-6
"""A distance below this share of ||merged|| is rounding: merged is held in float32."""


@dataclass(frozen=True)
class Noise:
    """How far a method's new global model lies from the ideal one, relative to the increment."""

    total: float
    modules: dict[str, float]


def aggregation_noise(before: GlobalModel, after: GlobalModel, increment: Delta) -> Noise:
    """||global_after - ideal||_F / ||increment||_F.

    ideal = W + delta(merged_before) + increment.

    increment: `ideal_increment` of the round. Where it is zero, the noise is 0 if the distance is
    zero too (to rounding) and infinite if it is not. Rounding leaves about 1e-7 of
    ||global_after|| / ||increment||.
    """
    terms: list[tuple[float, Delta]] = [(-1.0, increment)]
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
