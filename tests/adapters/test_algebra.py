"""Stack, inner product, norms and the other algebra equal the dense float64 deltas."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Delta, Dense, Factors, pays_dense
from adapters.algebra import (
    add,
    beyond,
    inner,
    mean_of_factors,
    module_norms,
    norm,
    pad,
    rescale,
    stack,
    total_norm,
    truncate,
    with_row_norm,
)
from core.errors import AdapterError
from tests.adapter_generators import QUICK, adapters, cohorts, make_adapter, shapes
from tests.dense_oracle import (
    dense,
    dense_deltas,
    dense_sum,
    distance,
    double,
    frobenius,
    mean_of_padded_factors,
    term_size,
)

SHAPES = {"layers.1.q_proj": (12, 9), "layers.11.q_proj": (9, 15)}
Cohort = tuple[list[Adapter], list[float]]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Adapter, Adapter]:
    over = draw(shapes())
    return draw(adapters(over)), draw(adapters(over))


@QUICK
@given(cohorts())
def test_stack_is_the_weighted_sum_to_float32_rounding_of_its_terms(cohort: Cohort) -> None:
    clients, weights = cohort
    stacked, ideal = stack(clients, weights), dense_sum(clients, weights)
    for name in ideal:
        terms = sum(term_size(x[name], w) for x, w in zip(clients, weights, strict=True))
        assert np.linalg.norm(dense(stacked[name]) - ideal[name]) <= 2e-7 * terms


@pytest.mark.parametrize("seed", range(5))
def test_stack_is_exact_to_1e_6_relative_at_mixed_ranks_and_scales(seed: int) -> None:
    clients = [make_adapter(seed * 7 + r, SHAPES, r, 16 / r) for r in (1, 4, 9, 20)]
    clients.append(make_adapter(seed, SHAPES, 3, 16 / 3**0.5))
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    ideal = dense_sum(clients, weights)
    assert distance(dense_deltas(stack(clients, weights)), ideal) <= 1e-6 * frobenius(ideal)


@QUICK
@given(cohorts())
def test_stack_holds_the_clients_rows_in_their_order(cohort: Cohort) -> None:
    clients, weights = cohort
    for name, factors in stack(clients, weights).items():
        assert factors.scale == 1.0
        assert np.array_equal(factors.a, np.concatenate([x[name].a for x in clients]))
        assert factors.rank == sum(x[name].rank for x in clients)


@QUICK
@given(cohorts())
def test_add_is_the_weighted_sum_in_the_form_with_fewer_values(cohort: Cohort) -> None:
    clients, weights = cohort
    found, ideal = add(clients, weights), dense_sum(clients, weights)
    for name, form in found.items():
        terms = sum(term_size(x[name], w) for x, w in zip(clients, weights, strict=True))
        assert np.linalg.norm(dense(form) - ideal[name]) <= 2e-7 * terms
        rank, (m, n) = sum(x[name].rank for x in clients), ideal[name].shape
        assert form.num_values == min(rank * (m + n), m * n)
        assert isinstance(form, Dense) == pays_dense(rank, (m, n))


def test_what_is_dense_stays_dense_in_a_sum_and_counts_as_the_matrix_that_it_is() -> None:
    x, y = make_adapter(1, SHAPES, 1, 0.5), make_adapter(2, SHAPES, 30, 3.0)
    dense_y = add([y], [1.0])
    assert all(isinstance(form, Dense) for form in dense_y.values())
    ideal = dense_sum([x, y], [1.0, -2.0])
    found = add([x, dense_y], [1.0, -2.0])
    assert all(isinstance(form, Dense) for form in found.values())
    assert distance(dense_deltas(found), ideal) <= 1e-6 * frobenius(ideal)
    norms = module_norms([(1.0, x), (-2.0, dense_y)])
    assert norms == pytest.approx({n: np.linalg.norm(ideal[n]) for n in SHAPES}, rel=1e-6)
    product = sum(float(np.vdot(dense(x[n]), dense(y[n]))) for n in SHAPES)
    assert inner(x, dense_y) == pytest.approx(product, rel=1e-5)
    assert inner(dense_y, x) == pytest.approx(product, rel=1e-5)
    assert norm(dense_y) == pytest.approx(frobenius(dense_deltas(y)), rel=1e-6)


def test_a_sum_of_more_directions_than_one_block_holds_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.dense.BLOCK", 5)
    clients = [make_adapter(r, SHAPES, r, 16 / r) for r in (1, 4, 9, 20, 3)]
    ideal = dense_sum(clients, [0.2] * 5)
    assert distance(dense_deltas(add(clients, [0.2] * 5)), ideal) <= 1e-6 * frobenius(ideal)


def test_an_adapter_and_a_delta_say_what_they_hold() -> None:
    x = make_adapter(1, SHAPES, 2, 0.5)
    assert repr(x) == "Adapter(2 modules, rank 2, 90 parameters)"
    delta = Delta({**x, "layers.1.q_proj": Dense(np.ones((12, 9), np.float32))})
    assert (delta.rank, delta.num_parameters, delta.shapes) == (9, 108 + 48, SHAPES)
    with pytest.raises(
        AdapterError, match=r"a dense delta is a float32 matrix \(m, n\); got float64"
    ):
        Dense(np.ones((3, 2)))  # type: ignore[arg-type]


def test_stack_adds_and_subtracts_with_weights_that_do_not_sum_to_1() -> None:
    x, y = make_adapter(1, SHAPES, 2, 0.5), make_adapter(2, SHAPES, 5, 3.0)
    ideal = dense_sum([x, y], [1.0, -2.0])
    assert distance(dense_deltas(stack([x, y], [1.0, -2.0])), ideal) <= 1e-6 * frobenius(ideal)


@pytest.mark.parametrize("combine", [stack, add, mean_of_factors])
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.25, 0.25], [0.5, np.nan], [np.inf, 0.5]])
def test_weights_that_are_missing_or_not_finite_are_refused(combine, weights) -> None:  # type: ignore[no-untyped-def]
    x = make_adapter(0, SHAPES, 2)
    message = f"expected one finite weight for each of 2 adapters; got {weights}"
    with pytest.raises(AdapterError, match=re.escape(message)):
        combine([x, x], weights)


def test_different_modules_are_never_combined() -> None:
    x, y = make_adapter(0, SHAPES, 2), make_adapter(0, {**SHAPES, "layers.1.q_proj": (1, 9)}, 2)
    combinations: list[Callable[[], object]] = [
        lambda: stack([x, y], [0.5, 0.5]),
        lambda: add([x, y], [0.5, 0.5]),
        lambda: mean_of_factors([x, y], [0.5, 0.5]),
        lambda: module_norms([(1.0, x), (1.0, y)]),
        lambda: inner(x, y),
    ]
    for combine in combinations:
        with pytest.raises(AdapterError, match=r"differs from adapter 0 in .*layers\.1\.q_proj"):
            combine()


@QUICK
@given(pairs())
def test_inner_is_the_dense_inner_product(pair: tuple[Adapter, Adapter]) -> None:
    x, y = pair
    expected = sum(float(np.vdot(dense(x[name]), dense(y[name]))) for name in x)
    terms = sum(term_size(x[name]) * term_size(y[name]) for name in x)
    assert inner(x, y) == pytest.approx(expected, rel=1e-12, abs=1e-13 * terms)


def assert_norm(found: float, expected: float, terms: float) -> None:
    """Exact, unless the terms cancel to nearly nothing: then it is an estimate."""
    if expected > 1e-5 * terms:
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        assert found == pytest.approx(expected, rel=0.6, abs=1e-12 * terms)


@QUICK
@given(adapters())
def test_norm_is_the_dense_norm(adapter: Adapter) -> None:
    terms = max(term_size(factors) for factors in adapter.values())
    assert_norm(norm(adapter), frobenius(dense_deltas(adapter)), terms)


@QUICK
@given(cohorts(), st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=4, max_size=4))
def test_module_norms_are_those_of_the_linear_combination(cohort: Cohort, c: list[float]) -> None:
    clients, _ = cohort
    factors = c[: len(clients)]
    norms = module_norms(list(zip(factors, clients, strict=True)))
    for name, delta in dense_sum(clients, factors).items():
        terms = sum(term_size(x[name], w) for x, w in zip(clients, factors, strict=True))
        assert_norm(norms[name], float(np.linalg.norm(delta)), terms)


def test_norms_hold_ten_digits_where_nothing_cancels() -> None:
    x, y = make_adapter(1, SHAPES, 6, 2.0), make_adapter(2, SHAPES, 3, 0.1)
    for name, delta in dense_sum([x, y], [2.0, -0.5]).items():
        found = module_norms([(2.0, x), (-0.5, y)])[name]
        assert found == pytest.approx(np.linalg.norm(delta), rel=1e-10)


def test_norm_of_a_difference_that_cancels_exactly_is_rounding_alone() -> None:
    x = make_adapter(3, SHAPES, 6, 2.0)
    for name, value in module_norms([(1.0, x), (-1.0, x)]).items():
        assert value <= 1e-14 * term_size(x[name])


@pytest.mark.parametrize(("rank", "tolerance"), [(1, 0.5), (9, 0.25)])
@pytest.mark.parametrize("apart", [1e-8, 1e-10, 1e-12])
def test_norm_of_a_difference_that_nearly_cancels_is_estimated(
    apart: float, rank: int, tolerance: float
) -> None:
    x, y = make_adapter(4, SHAPES, 6, 2.0), make_adapter(5, SHAPES, rank, 1.0)
    norms = module_norms([(1.0, x), (apart, y), (-1.0, x)])
    for name, factors in y.items():
        expected = apart * float(np.linalg.norm(dense(factors)))
        assert norms[name] == pytest.approx(expected, rel=tolerance)


def test_total_norm_is_the_norm_of_the_norms() -> None:
    assert total_norm({"a": 2.0, "b": 3.0, "c": 6.0}) == 7.0
    assert total_norm({}) == 0.0


@QUICK
@given(adapters(), st.integers(0, 9))
def test_truncate_keeps_the_first_rows_and_columns(adapter: Adapter, rank: int) -> None:
    for name, cut in truncate(adapter, rank).items():
        whole = adapter[name]
        assert cut.rank == min(rank, whole.rank)
        columns = [np.outer(double(whole.b[:, j]), whole.a[j]) for j in range(cut.rank)]
        expected = whole.scale * sum(columns, start=np.zeros(whole.shape))
        assert np.allclose(dense(cut), expected, rtol=1e-12, atol=1e-13 * term_size(whole))


@QUICK
@given(adapters(), st.integers(0, 22))
def test_what_truncate_keeps_and_what_is_beyond_are_the_whole(adapter: Adapter, rank: int) -> None:
    first, rest = truncate(adapter, rank), beyond(adapter, rank)
    assert rest.shapes == adapter.shapes
    for name, whole in adapter.items():
        assert (rest[name].rank, rest[name].scale) == (max(0, whole.rank - rank), whole.scale)
        assert np.array_equal(np.concatenate([first[name].a, rest[name].a]), whole.a)
        assert np.array_equal(np.concatenate([first[name].b, rest[name].b], axis=1), whole.b)


@QUICK
@given(adapters(), st.sampled_from([1e-3, 3**-0.5, 1.0, 50.0]))
def test_rows_of_one_norm_keep_their_direction_and_the_delta(adapter: Adapter, size: float) -> None:
    for name, found in with_row_norm(adapter, size).items():
        before = adapter[name]
        rows = np.linalg.norm(double(before.a), axis=1)
        live = rows > 0.0
        np.testing.assert_allclose(np.linalg.norm(double(found.a[live]), axis=1), size, rtol=1e-6)
        scaled = double(before.a[live]) * (size / rows[live])[:, None]
        np.testing.assert_allclose(found.a[live], scaled, rtol=1e-5, atol=1e-6 * size)
        assert found.scale == before.scale
        assert np.linalg.norm(dense(found) - dense(before)) <= 5e-7 * term_size(before)


def test_a_row_of_zeros_and_its_column_stay() -> None:
    a = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    x = Adapter({"q": Factors(a, np.ones((3, 2), np.float32), 2.0)})
    found = with_row_norm(x, 1.0)["q"]
    np.testing.assert_allclose(found.a, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(found.b, [[5.0, 1.0]] * 3, rtol=1e-6)


@QUICK
@given(adapters(), st.integers(0, 5))
def test_pad_changes_the_rank_and_nothing_else(adapter: Adapter, more: int) -> None:
    padded = pad(adapter, adapter.rank + more)
    assert {factors.rank for factors in padded.values()} == {adapter.rank + more}
    assert padded.shapes == adapter.shapes
    for name, factors in adapter.items():
        assert np.array_equal(padded[name].a[: factors.rank], factors.a)
        assert np.array_equal(padded[name].b[:, : factors.rank], factors.b)
        assert not padded[name].a[factors.rank :].any()
        assert not padded[name].b[:, factors.rank :].any()
        assert padded[name].scale == factors.scale


def test_pad_refuses_to_lower_a_rank() -> None:
    with pytest.raises(AdapterError, match=r"layers\.1\.q_proj has rank 5.* to rank 4"):
        pad(make_adapter(0, SHAPES, 5), 4)


@QUICK
@given(adapters(), st.sampled_from([1e-3, 0.25, 1.0, 7.0, 1e4]))
def test_rescale_keeps_delta_and_rows_and_sets_the_scale(adapter: Adapter, scale: float) -> None:
    for name, factors in rescale(adapter, scale).items():
        before = adapter[name]
        assert factors.scale == scale
        assert np.array_equal(factors.a, before.a)
        assert np.linalg.norm(dense(factors) - dense(before)) <= 2e-7 * term_size(before)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_rescale_refuses_a_scale_that_is_not_above_zero(scale: float) -> None:
    with pytest.raises(AdapterError, match=f"must be finite and above zero; got {scale}"):
        rescale(make_adapter(0, SHAPES, 2), scale)


@QUICK
@given(shapes(), st.sampled_from([1, 3, 8, 21]), st.data())
def test_mean_of_factors_averages_each_factor_with_its_scale(
    over: dict[str, tuple[int, int]], rank: int, data: st.DataObject
) -> None:
    clients = data.draw(st.lists(adapters(over, ranks=[rank]), min_size=1, max_size=4))
    weights = [2.0 * (k + 1) / (len(clients) * (len(clients) + 1)) for k in range(len(clients))]
    mean, products = mean_of_factors(clients, weights), mean_of_padded_factors(clients, weights)
    for name, factors in mean.items():
        parts = [(w, x[name]) for w, x in zip(weights, clients, strict=True)]
        a = np.sum([w * double(f.a) for w, f in parts], axis=0)
        b = np.sum([w * f.scale * double(f.b) for w, f in parts], axis=0)
        size_a = sum(w * np.linalg.norm(f.a) for w, f in parts)
        size_b = sum(w * f.scale * np.linalg.norm(f.b) for w, f in parts)
        assert factors.scale == 1.0
        assert np.linalg.norm(factors.a - a) <= 5e-7 * size_a
        assert np.linalg.norm(factors.b - b) <= 5e-7 * size_b
        assert np.linalg.norm(dense(factors) - products[name]) <= 1e-6 * size_a * size_b


def test_mean_of_factors_refuses_mixed_ranks_and_names_them() -> None:
    clients = [make_adapter(0, SHAPES, r) for r in (4, 2, 4)]
    with pytest.raises(AdapterError, match=r"layers\.1\.q_proj comes with ranks \[2, 4\]"):
        mean_of_factors(clients, [0.4, 0.3, 0.3])
