"""What FLoRA alone promises: the lowest rank, and truncation by energy as it declares it."""

from dataclasses import replace

import numpy as np
import pytest

from adapters.adapter import Adapter, Delta, Factors, pays_dense
from core.errors import AdapterError
from strategies.flora import Flora
from strategies.noise import compare, ideal_change
from strategies.registry import make_strategy
from strategies.strategy import Cohort, GlobalModel, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import (
    Deltas,
    add,
    best_error,
    dense,
    dense_deltas,
    dense_sum,
    distance,
    double,
    energy_kept,
    frobenius,
)

SHAPES = {"layers.1.q_proj": (10, 24), "layers.11.q_proj": (24, 9)}
ENERGIES = [0.3, 0.9, 0.99, 0.9999]


def updates_of(*ranks: int, seed: int = 0) -> list[Update]:
    return [
        Update(f"client-{k}", 1 / len(ranks), make_adapter(10 * seed + k, SHAPES, rank, 16 / rank))
        for k, rank in enumerate(ranks)
    ]


def summed(updates: list[Update]) -> Deltas:
    return dense_sum([u.adapter for u in updates], [u.weight for u in updates])


def merged_of(model: GlobalModel) -> Delta:
    assert model.merged is not None
    assert model.start is None
    return model.merged


@pytest.mark.parametrize("ranks", [(4,), (1, 2, 3), (8, 8, 8, 8), (64, 4)])
def test_the_rank_is_that_of_the_sum_until_the_matrix_is_the_smaller_form(
    ranks: tuple[int, ...],
) -> None:
    merged = merged_of(Flora().aggregate(GlobalModel(), Cohort(updates_of(*ranks))).model)
    for name, factors in merged.items():
        assert isinstance(factors, Factors) != pays_dense(sum(ranks), SHAPES[name])
        if not isinstance(factors, Factors):
            continue
        assert factors.rank == sum(ranks)
        columns = np.linalg.norm(double(factors.b), axis=0)
        assert np.all(np.diff(columns) <= 1e-6 * columns[0])


def test_no_clients_block_is_left_to_be_read() -> None:
    updates = updates_of(2, 3)
    merged = merged_of(Flora().aggregate(GlobalModel(), Cohort(updates)).model)
    for name, factors in merged.items():
        assert isinstance(factors, Factors)
        for row in np.concatenate([u.adapter[name].a for u in updates]):
            cosines = factors.a @ row / np.linalg.norm(factors.a, axis=1) / np.linalg.norm(row)
            assert np.abs(cosines).max() < 0.99


@pytest.mark.parametrize("energy", ENERGIES)
def test_energy_truncates_each_module_as_declared(energy: float) -> None:
    strategy, before = Flora(energy), GlobalModel(merged=make_adapter(5, SHAPES, 4, 2.0))
    updates = updates_of(2, 4, 3)
    ideal = add(dense_deltas(before.merged), summed(updates))
    for name, form in merged_of(strategy.aggregate(before, Cohort(updates)).model).items():
        rank = int(np.linalg.matrix_rank(dense(form), 1e-4 * np.linalg.norm(dense(form))))
        assert energy_kept(ideal[name], rank) >= energy
        assert energy_kept(ideal[name], rank - 1) < energy
        assert isinstance(form, Factors) != pays_dense(rank, SHAPES[name])
        error = np.linalg.norm(ideal[name] - dense(form))
        best = best_error(ideal[name], rank)
        assert error <= 1.001 * best + 1e-6 * np.linalg.norm(ideal[name])


@pytest.mark.parametrize("energy", ENERGIES)
def test_what_energy_gives_up_is_logged_as_noise(energy: float) -> None:
    strategy, updates = Flora(energy), updates_of(2, 4, 3)
    after = strategy.aggregate(GlobalModel(), Cohort(updates)).model
    noise = compare(GlobalModel(), after, ideal_change(Cohort(updates), None)).noise
    assert noise is not None
    true = distance(dense_deltas(after.merged), summed(updates)) / frobenius(summed(updates))
    assert noise == pytest.approx(true, rel=1e-5, abs=1e-7)
    assert noise <= np.sqrt(1.0 - energy) + 1e-6


def test_only_the_lossless_energy_is_declared_exact() -> None:
    assert make_strategy("flora") == make_strategy("flora", energy=1.0) == Flora()
    assert Flora().properties.exact
    assert make_strategy("flora", energy=0.99) == Flora(0.99)
    assert not make_strategy("flora", energy=0.99).properties.exact


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_an_energy_that_cannot_be_kept_is_refused(energy: float) -> None:
    with pytest.raises(AdapterError, match=rf"energy must lie in \(0, 1\].*got {energy}"):
        Flora(energy).aggregate(GlobalModel(), Cohort(updates_of(2)))


def test_clients_that_differ_in_their_modules_are_refused() -> None:
    first, second = updates_of(2, 2)
    lacking = Adapter({"layers.1.q_proj": second.adapter["layers.1.q_proj"]})
    with pytest.raises(AdapterError, match=r"adapter 1 differs from adapter 0 in .*layers\.11"):
        Flora().aggregate(GlobalModel(), Cohort([first, replace(second, adapter=lacking)]))
