"""Truncation by energy and by rank: as good as Eckart-Young allows, and honest about its error."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapters.adapter import Adapter
from adapters.refactoring import refactor
from core.errors import AdapterError
from tests.adapter_generators import QUICK, adapters, make_adapter
from tests.dense_oracle import (
    best_error,
    dense,
    dense_deltas,
    distance,
    energy_kept,
    frobenius,
    term_size,
)

KINDS = ("normal", "A large, B small", "columns repeated", "graded", "half of A zero")
ENERGIES = st.sampled_from([0.05, 0.5, 0.9, 0.99, 0.999, 0.999999])
SLACK = 1e-9  # in a share of energy: what float64 leaves of it


def floor(adapter: Adapter) -> float:
    """What float32 factors leave of an error of zero."""
    return 2e-7 * sum(term_size(factors) for factors in adapter.values())


@QUICK
@given(adapters(kinds=KINDS), ENERGIES)
def test_energy_keeps_what_was_asked_and_not_one_direction_more(
    adapter: Adapter, energy: float
) -> None:
    for name, after in refactor(adapter, energy=energy).adapter.items():
        delta = dense(adapter[name])
        if not delta.any():
            assert after.rank == 0
            continue
        assert energy_kept(delta, after.rank) >= energy - SLACK
        assert energy_kept(delta, after.rank - 1) < energy + SLACK


@QUICK
@given(adapters(kinds=KINDS), ENERGIES)
def test_the_truncated_delta_itself_holds_the_energy(adapter: Adapter, energy: float) -> None:
    for name, after in refactor(adapter, energy=energy).adapter.items():
        delta = dense(adapter[name])
        missing = np.linalg.norm(delta - dense(after)) ** 2
        allowed = (1.0 - energy + SLACK) * np.linalg.norm(delta) ** 2
        assert missing <= 1.001 * allowed + floor(adapter) ** 2


@QUICK
@given(adapters(kinds=KINDS), st.integers(1, 9))
def test_rank_gives_the_best_approximation_of_that_rank(adapter: Adapter, rank: int) -> None:
    for name, after in refactor(adapter, rank=rank).adapter.items():
        delta = dense(adapter[name])
        error = np.linalg.norm(delta - dense(after))
        assert after.rank <= rank
        assert error <= 1.001 * best_error(delta, rank) + floor(adapter)
        assert error >= 0.999 * best_error(delta, rank) - floor(adapter)


@QUICK
@given(adapters(kinds=KINDS), ENERGIES, st.integers(1, 9))
def test_the_reported_error_is_the_true_one(adapter: Adapter, energy: float, rank: int) -> None:
    size = frobenius(dense_deltas(adapter))
    assume(size > 0.0)
    for result in (
        refactor(adapter, energy=energy),
        refactor(adapter, rank=rank),
        refactor(adapter, energy=energy, rank=rank),
    ):
        true = distance(dense_deltas(result.adapter), dense_deltas(adapter))
        assert result.error == pytest.approx(true / size, rel=1e-3, abs=floor(adapter) / size)


@QUICK
@given(adapters(kinds=KINDS), ENERGIES, st.integers(1, 9))
def test_of_energy_and_rank_the_smaller_one_holds(
    adapter: Adapter, energy: float, rank: int
) -> None:
    both = refactor(adapter, energy=energy, rank=rank).adapter
    by_energy = refactor(adapter, energy=energy).adapter
    for name, after in both.items():
        assert after.rank == min(rank, by_energy[name].rank)


@QUICK
@given(adapters(kinds=KINDS), st.integers(1, 3))
def test_the_spectrum_includes_what_was_cut_off(adapter: Adapter, rank: int) -> None:
    whole, cut = refactor(adapter), refactor(adapter, energy=0.5, rank=rank)
    for name in adapter:
        assert np.array_equal(whole.singular_values[name], cut.singular_values[name])


def test_error_is_that_of_all_modules_together() -> None:
    small = make_adapter(1, {"a": (9, 12)}, 5, 0.01)
    big = make_adapter(2, {"b": (12, 9)}, 6, 3.0)
    both = Adapter({**small, **big})
    lost = np.hypot(best_error(dense(both["a"]), 2), best_error(dense(both["b"]), 2))
    expected = lost / frobenius(dense_deltas(both))
    assert refactor(both, rank=2).error == pytest.approx(float(expected), rel=1e-6)


def test_each_module_keeps_its_own_energy() -> None:
    small = make_adapter(3, {"a": (9, 12)}, 5, 1e-4)
    both = Adapter({**small, **make_adapter(4, {"b": (12, 9)}, 6, 3.0)})
    after = refactor(both, energy=0.9).adapter
    assert after["a"].rank == refactor(small, energy=0.9).adapter["a"].rank > 1


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.0001, float("nan")])
def test_an_energy_outside_0_to_1_is_refused(energy: float) -> None:
    with pytest.raises(AdapterError, match=rf"\(0, 1\], where 1\.0 is lossless; got {energy}"):
        refactor(make_adapter(0, {"q": (3, 3)}, 2), energy=energy)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(rank: int) -> None:
    with pytest.raises(AdapterError, match=f"rank to keep must be at least 1; got {rank}"):
        refactor(make_adapter(0, {"q": (3, 3)}, 2), rank=rank)
