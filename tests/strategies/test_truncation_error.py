"""Where a method cuts to a rank, none of that rank is nearer: against a dense decomposition."""

import numpy as np
import pytest

from adapters.adapter import draw
from strategies.registry import make_strategy
from strategies.strategy import Cohort, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Dense, best_error, dense, dense_sum, energy_kept

SHAPES = {"q_proj": (256, 192)}
RANKS = (32, 16, 8, 8)
WEIGHTS = (0.4, 0.3, 0.2, 0.1)


def updates_of(kind: str) -> list[Update]:
    return [
        Update(str(k), p, make_adapter(k, SHAPES, r, 16 / r, kind))
        for k, (r, p) in enumerate(zip(RANKS, WEIGHTS, strict=True))
    ]


def mean_of(updates: list[Update]) -> Dense:
    return dense_sum([u.adapter for u in updates], list(WEIGHTS))["q_proj"]


@pytest.mark.parametrize("kind", ["normal", "A large, B small", "columns repeated"])
def test_flexlora_is_the_best_approximation_of_its_rank(kind: str) -> None:
    updates, strategy = updates_of(kind), make_strategy("flexlora")
    after = strategy.aggregate(
        strategy.begin(draw(SHAPES, max(RANKS), 1, 1.0)), Cohort(updates)
    ).model
    assert after.start is not None
    found, wanted = after.start["q_proj"], mean_of(updates)
    assert found.rank <= max(RANKS)
    assert energy_kept(wanted, max(RANKS)) <= energy_kept(wanted, found.rank) + 1e-12
    size = np.linalg.norm(wanted)
    assert (
        np.linalg.norm(wanted - dense(found))
        <= 1.001 * best_error(wanted, found.rank) + 1e-6 * size
    )
    for rank in (16, 8):  # what a smaller client takes of it
        cut = dense(type(found)(found.a[:rank], found.b[:, :rank], found.scale))
        assert np.linalg.norm(wanted - cut) <= 1.001 * best_error(wanted, rank) + 1e-6 * size


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_florist_is_the_best_approximation_at_the_lowest_rank_with_its_energy(
    energy: float,
) -> None:
    updates, strategy = updates_of("normal"), make_strategy("florist", energy=energy)
    after = strategy.aggregate(
        strategy.begin(draw(SHAPES, max(RANKS), 1, 1.0)), Cohort(updates)
    ).model
    assert after.merged is not None
    found, wanted = after.merged["q_proj"], mean_of(updates)
    assert energy_kept(wanted, found.rank) >= energy > energy_kept(wanted, found.rank - 1)
    assert np.linalg.norm(wanted - dense(found)) <= 1.001 * best_error(wanted, found.rank)
    assert not strategy.properties.exact
