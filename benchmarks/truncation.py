"""FlexLoRA and FLoRIST by stacked factors over the dense route of their authors.

    dense   sum_k p_k s_k B_k A_k as one matrix, its singular value decomposition, and the first r
            directions (FlexLoRA) or those that hold the energy (FLoRIST)

One module of 2048 x 2048; ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4 (sum 160). Goals:
at most a fortieth of the time, and an error at most 1.001 of the best approximation of that rank.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from adapters.adapter import Factors
from benchmarks.algebra import RANKS, clients
from benchmarks.measuring import Row, alternate, progress, ratios, report
from strategies.flexlora import FlexLora
from strategies.florist import Florist
from strategies.strategy import Cohort, GlobalModel, Strategy, Update

REPEATS = 3
ENERGY = 0.9
Dense = npt.NDArray[np.float32]


def dense_mean(updates: list[Update]) -> Dense:
    """The mean delta as a matrix."""
    total = np.zeros(updates[0].adapter["q_proj"].shape, np.float32)
    for update in updates:
        f = update.adapter["q_proj"]
        total += np.float32(update.weight * f.scale) * (f.b @ f.a)
    return total


def dense_route(updates: list[Update], rank: int) -> Dense:
    """The first directions of the decomposed mean; rank 0: as many as hold the energy."""
    left, values, right = np.linalg.svd(dense_mean(updates), full_matrices=False)
    if not rank:
        energy = np.cumsum(values**2) / np.sum(values**2)
        rank = int(np.searchsorted(energy, ENERGY)) + 1
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def compared(name: str, strategy: Strategy, updates: list[Update], rank: int) -> Iterator[Row]:
    """Time over the dense route, and error over the best of the same rank."""
    begin = GlobalModel(state={"rank": max(RANKS)})
    ours, dense = alternate(
        REPEATS,
        lambda: strategy.aggregate(begin, Cohort(updates)).model,
        lambda: dense_route(updates, rank),
    )
    yield Row(f"{name}, stacked factors / dense route", ratios(ours, dense), 1 / 40, kind="share")
    after = strategy.aggregate(begin, Cohort(updates)).model.total()
    assert after is not None
    found = after["q_proj"]
    assert isinstance(found, Factors)
    mean = dense_mean(updates).astype(np.float64)
    error = np.linalg.norm(mean - found.b.astype(np.float64) @ found.a)
    values = np.linalg.svd(mean, compute_uv=False)
    best = np.sqrt(np.sum(values[found.rank :] ** 2))
    yield Row(f"{name}, error / best of rank {found.rank}", [float(error / best)], 1.001)


def measure(quick: bool) -> Iterator[Row]:
    """Both methods."""
    adapters = clients(256 if quick else 2048, 1)
    updates = [Update(str(k), 1 / len(adapters), adapter) for k, adapter in enumerate(adapters)]
    progress("flexlora")
    yield from compared("flexlora", FlexLora(), updates, max(RANKS))
    progress("florist")
    yield from compared("florist", Florist(ENERGY), updates, 0)


if __name__ == "__main__":
    report(measure)
