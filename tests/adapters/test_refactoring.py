"""The lossless refactor: the same delta, the lowest rank, the spectrum of the dense SVD."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Delta, Dense, Factors, pays_dense
from adapters.algebra import stack, truncate
from adapters.refactoring import (
    LOSSLESS_TAIL,
    as_factors,
    compact,
    effective_rank,
    leading,
    refactor,
)
from adapters.refactoring import singular_values as spectra_of
from tests.adapter_generators import AWKWARD, QUICK, adapters, cohorts, make_adapter, make_factors
from tests.dense_oracle import best_error, dense, double, energy_kept, singular_values, term_size

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 40), (40, 1), (7, 8)]
CANCELLATION = 4e-8
"""Share of the rank-one terms that may be lost where they cancel: Gram matrices keep half of
float64's digits."""


def relative_error(before: Factors, after: Factors) -> float:
    delta = dense(before)
    return float(np.linalg.norm(dense(after) - delta) / np.linalg.norm(delta))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 8, 12, 60])
@pytest.mark.parametrize("scale", [2.0, 16 / 60**0.5, -0.5])
def test_refactor_is_lossless_and_falls_to_the_smallest_dimension(
    shape: tuple[int, int], rank: int, scale: float
) -> None:
    adapter = make_adapter(rank, {"q": shape}, rank, scale)
    result = refactor(adapter)
    assert relative_error(adapter["q"], result.adapter["q"]) <= 1e-6
    assert result.adapter["q"].rank == min(rank, *shape)
    assert result.adapter["q"].scale == 1.0
    assert result.error <= LOSSLESS_TAIL == 1e-7


@QUICK
@given(adapters())
def test_refactor_is_lossless_for_awkward_factors(adapter: Adapter) -> None:
    result = refactor(adapter)
    assert result.adapter.shapes == adapter.shapes
    assert result.error <= 1e-7
    for name, before in adapter.items():
        delta, after = dense(before), result.adapter[name]
        tolerance = 1e-6 * np.linalg.norm(delta) + CANCELLATION * term_size(before)
        assert np.linalg.norm(dense(after) - delta) <= tolerance
        assert after.rank <= min(before.rank, *before.shape)


@QUICK
@given(cohorts())
def test_a_refactored_stack_has_the_rank_of_the_smallest_dimension_at_most(
    cohort: tuple[list[Adapter], list[float]],
) -> None:
    stacked = stack(*cohort)
    for name, after in refactor(stacked).adapter.items():
        assert after.rank <= min(sum(x[name].rank for x in cohort[0]), *stacked[name].shape)


@QUICK
@given(adapters())
def test_singular_values_are_those_of_the_dense_delta(adapter: Adapter) -> None:
    spectra = refactor(adapter).singular_values
    assert list(spectra) == list(adapter) == list(spectra_of(adapter))
    for name, factors in adapter.items():
        expected = singular_values(dense(factors))
        values = np.zeros_like(expected)  # those beyond the rank are zero and may be missing
        values[: len(spectra[name])] = spectra[name]
        tolerance = 1e-9 * expected[0] + CANCELLATION * term_size(factors)
        assert np.allclose(values, expected, rtol=0.0, atol=tolerance)
        assert np.all(np.diff(spectra[name]) <= 0.0)
        assert np.allclose(spectra_of(adapter)[name], spectra[name], rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 60])
def test_columns_are_orthogonal_with_the_singular_values_as_squared_norms(
    shape: tuple[int, int], rank: int
) -> None:
    adapter = make_adapter(rank, {"q": shape}, rank, 0.5)
    expected = singular_values(dense(adapter["q"]))[:rank]
    after = refactor(adapter).adapter["q"]
    b, a = double(after.b), double(after.a)
    assert np.allclose(b.T @ b, np.diag(expected), rtol=0, atol=1e-6 * expected[0])
    assert np.allclose(a @ a.T, np.diag(expected), rtol=0, atol=1e-6 * expected[0])


@QUICK
@given(adapters(), st.integers(0, 8))
def test_the_first_columns_are_the_best_approximation(adapter: Adapter, rank: int) -> None:
    cut = truncate(refactor(adapter).adapter, rank)
    for name, factors in adapter.items():
        delta = dense(factors)
        error = np.linalg.norm(delta - dense(cut[name]))
        floor = 1e-6 * np.linalg.norm(delta) + CANCELLATION * term_size(factors)
        assert error <= 1.001 * best_error(delta, rank) + floor


@pytest.mark.parametrize(
    ("kind", "rank"), [("columns repeated", 1), ("A of rank one", 1), ("half of A zero", 3)]
)
def test_directions_that_are_not_there_are_dropped(kind: str, rank: int) -> None:
    adapter = make_adapter(5, {"q": (20, 30)}, 6, 4.0, kind)
    after = refactor(adapter).adapter["q"]
    assert after.rank == rank
    assert relative_error(adapter["q"], after) <= 1e-6


def test_equal_clients_cost_no_more_than_one_of_them() -> None:
    client = make_adapter(6, {"q": (24, 32)}, 5, 2.0)
    stacked = stack([client] * 8, [1 / 8] * 8)
    after = refactor(stacked).adapter["q"]
    assert (stacked.rank, after.rank) == (40, 5)
    assert relative_error(client["q"], after) <= 1e-6


@pytest.mark.parametrize("kind", ["B zero", "normal"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_zero_delta_has_rank_0_and_an_empty_spectrum(kind: str, scale: float) -> None:
    rank = 0 if kind == "normal" and scale else 4
    result = refactor(make_adapter(7, {"q": (5, 6)}, rank, scale, kind))
    assert result.adapter["q"].rank == 0
    assert result.adapter["q"].shape == (5, 6)
    assert result.error == 0.0
    assert not np.any(result.singular_values["q"])


def test_an_adapter_without_modules_stays_one() -> None:
    assert len(refactor(Adapter({})).adapter) == 0


def test_clients_that_cancel_exactly_leave_rounding_alone() -> None:
    client = make_adapter(8, {"q": (24, 32)}, 5, 2.0)
    result = refactor(stack([client, client], [1.0, -1.0]))
    assert np.linalg.norm(dense(result.adapter["q"])) <= 1e-9 * term_size(client["q"])


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5, 1e-6])
def test_clients_that_nearly_cancel_keep_their_small_difference(apart: float) -> None:
    rng = np.random.default_rng(9)
    u, v = rng.standard_normal((2, 30, 1)), rng.standard_normal((2, 1, 40))
    b = np.hstack([u[0], u[0] + apart * u[1]]).astype(np.float32)
    a = np.vstack([v[0], -v[0] + apart * v[1]]).astype(np.float32)
    before = Factors(a, b, 1.0)
    assert relative_error(before, refactor(Adapter({"q": before})).adapter["q"]) <= 1e-6


@pytest.mark.parametrize("power", [6, 12, 15])
def test_a_lopsided_split_between_the_factors_loses_nothing(power: int) -> None:
    rng = np.random.default_rng(10)
    large = make_factors(rng, (20, 30), 3, 1.0)
    ten = np.float32(10.0**power)
    first = Factors(large.a * ten, large.b / ten, 0.5)
    last = Factors(large.a[::-1] / ten, make_factors(rng, (20, 30), 3, 1.0).b * ten, 0.5)
    stacked = stack([Adapter({"q": first}), Adapter({"q": last})], [0.5, 0.5])
    after = refactor(stacked).adapter["q"]
    assert relative_error(stacked["q"], after) <= 1e-6
    assert after.rank == 3  # both clients have the same rows of A
    norms = [np.linalg.norm(after.a), np.linalg.norm(after.b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("small", [1e-3, 1e-5])
def test_a_tiny_client_beside_a_big_one_is_kept(small: float) -> None:
    big, other = (make_adapter(seed, {"q": (20, 30)}, 4) for seed in (11, 12))
    tiny = Adapter({"q": Factors(other["q"].a, other["q"].b, small)})
    result = refactor(stack([big, tiny], [0.5, 0.5]))
    assert result.adapter["q"].rank == 8
    rest = dense(result.adapter["q"]) - 0.5 * dense(big["q"])
    expected = 0.5 * dense(tiny["q"])
    error = np.linalg.norm(rest - expected)
    assert error <= 1e-7 * np.linalg.norm(dense(big["q"]))  # float32 holds no more beside the big
    assert error <= 0.05 * np.linalg.norm(expected)


def test_refactoring_twice_changes_nothing_more() -> None:
    adapter = make_adapter(13, {"q": (20, 30), "v": (9, 4)}, 11, 3.0)
    once = refactor(adapter).adapter
    twice = refactor(once).adapter
    for name in adapter:
        assert twice[name].rank == once[name].rank
        assert relative_error(once[name], twice[name]) <= 2e-7


@pytest.mark.parametrize("kind", AWKWARD)
def test_the_input_is_not_written_to(kind: str) -> None:
    adapter = make_adapter(14, {"q": (6, 5)}, 8, 2.0, kind)
    before = adapter["q"].a.copy(), adapter["q"].b.copy()
    adapter["q"].a.setflags(write=False)
    adapter["q"].b.setflags(write=False)
    refactor(adapter)
    refactor(adapter, energy=0.5, rank=2)
    assert np.array_equal(adapter["q"].a, before[0])
    assert np.array_equal(adapter["q"].b, before[1])


@QUICK
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_effective_rank_is_a_scale_free_count_of_directions(
    values: list[float], factor: float
) -> None:
    shares = np.asarray(values) / np.sum(values)
    expected = float(np.prod(shares**-shares))  # exp(-sum p log p), as a product of powers
    assert effective_rank(values) == pytest.approx(expected, rel=1e-9)
    assert effective_rank([factor * value for value in values]) == pytest.approx(expected, rel=1e-9)
    assert effective_rank([*values, 0.0, 0.0]) == pytest.approx(expected, rel=1e-9)
    assert 1.0 - 1e-9 <= effective_rank(values) <= len(values) + 1e-9


def test_effective_rank_of_equal_one_and_no_directions() -> None:
    assert effective_rank([3.0] * 7) == pytest.approx(7.0)
    assert effective_rank([5.0, 0.0]) == 1.0
    assert effective_rank([0.0, 0.0]) == effective_rank([]) == 0.0


def test_effective_rank_of_a_refactored_delta_is_that_of_its_dense_spectrum() -> None:
    adapter = make_adapter(15, {"q": (20, 30)}, 6, 2.0)
    values = singular_values(dense(adapter["q"]))[:6]
    shares = values / values.sum()
    found = effective_rank(refactor(adapter).singular_values["q"])
    assert found == pytest.approx(float(np.prod(shares**-shares)), rel=1e-9)


def dense_of(seed: int, shape: tuple[int, int], rank: int) -> Dense:
    return Dense(dense(make_adapter(seed, {"q": shape}, rank)["q"]).astype(np.float32))


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (130, 150), (150, 130)])
@pytest.mark.parametrize("rank", [3, 200])
def test_a_dense_delta_refactors_losslessly_and_is_cut_at_its_best(
    shape: tuple[int, int], rank: int
) -> None:
    form = dense_of(1, shape, rank)
    delta = Delta({"q": form})
    result = refactor(delta)
    whole, size = dense(form), float(np.linalg.norm(dense(form)))
    assert np.linalg.norm(dense(result.adapter["q"]) - whole) <= 1e-6 * size
    assert np.linalg.norm(dense(as_factors(delta)["q"]) - whole) <= 1e-6 * size
    expected = singular_values(whole)
    for found in (result.singular_values["q"], spectra_of(delta)["q"]):
        assert np.allclose(found, expected, rtol=0.0, atol=3e-8 * expected[0])
    cut = refactor(delta, rank=2)
    error = np.linalg.norm(whole - dense(cut.adapter["q"]))
    assert error <= 1.001 * best_error(whole, 2) + 1e-6 * size
    assert cut.error == pytest.approx(best_error(whole, 2) / size, rel=1e-4)


@pytest.mark.parametrize(("rank", "dense_after"), [(1, False), (3, False), (4, True), (30, True)])
def test_compact_holds_the_form_with_fewer_values(rank: int, dense_after: bool) -> None:
    adapter = make_adapter(2, {"q": (7, 9)}, rank)  # 63 / 16 = 3.9
    found = compact(adapter)["q"]
    assert isinstance(found, Dense) == dense_after
    assert np.linalg.norm(dense(found) - dense(adapter["q"])) <= 1e-6 * term_size(adapter["q"])
    assert compact(Delta({"q": found}))["q"].shape == (7, 9)


def test_compact_cuts_a_dense_delta_to_factors_only_where_these_are_fewer_values() -> None:
    delta = Delta({"q": dense_of(3, (20, 24), 24)})
    whole = dense(delta["q"])
    for energy in (0.3, 0.6, 0.95):
        found = compact(delta, energy)["q"]
        rank = int(np.linalg.matrix_rank(dense(found), 1e-4))
        assert energy_kept(whole, rank) >= energy > energy_kept(whole, rank - 1)
        assert isinstance(found, Dense) == pays_dense(rank, (20, 24))
    assert compact(delta)["q"] is delta["q"]


def test_factors_stay_what_they_are_beside_a_dense_module() -> None:
    adapter = make_adapter(4, {"q": (5, 4), "v": (5, 4)}, 2, 3.0)
    written = as_factors(Delta({"q": adapter["q"], "v": dense_of(4, (5, 4), 4)}))
    assert written["q"] is adapter["q"]
    assert written["v"].rank == 4


def with_spectrum(shape: tuple[int, int], spectrum: npt.NDArray[np.float64]) -> Dense:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, len(spectrum))))[0] for side in shape)
    return Dense(((left * spectrum) @ right.T).astype(np.float32))


@pytest.mark.parametrize("shape", [(9, 14), (150, 400), (400, 150), (400, 1000)])
def test_the_leading_directions_of_a_matrix_are_those_of_its_svd(shape: tuple[int, int]) -> None:
    form = with_spectrum(shape, 0.8 ** np.arange(min(shape)))
    factors, values = leading(form, 4)
    assert np.allclose(values, singular_values(dense(form))[:4], rtol=1e-6)
    error = np.linalg.norm(dense(form) - dense(factors))
    assert error <= (1.0 + 1e-6) * best_error(dense(form), 4)
    again, _ = leading(form, 4)
    assert np.array_equal(again.a, factors.a)


def test_leading_directions_of_equal_strength_hold_as_much_as_any_others() -> None:
    form = dense_of(5, (150, 400), 150)  # a flat spectrum
    factors, values = leading(form, 4)
    assert factors.rank == len(values) == 4
    best = singular_values(dense(form))[:4]
    assert np.sum(values**2) >= 0.99 * np.sum(best**2)
    assert np.all(values <= best * (1.0 + 1e-6))


def test_directions_that_a_large_matrix_does_not_have_are_not_led_by() -> None:
    factors, values = leading(dense_of(6, (150, 400), 2), 4)
    assert factors.rank == len(values) == 2
