"""Norms, clipping and the geometric median against dense float64 matrices."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors
from adapters.algebra import truncate
from server.admission import Admitted, Reply
from server.broadcast import Asked
from server.combining import changes_of, weigh
from server.guard import change_norm, clip_change, geometric_median_weights, guard, step_norm
from settings.federation import ClientsSettings
from settings.run import run_settings
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, add, dense_deltas, frobenius
from tests.fake_clients import member_named, replied
from wire.codec import pack
from wire.rules import LocalRule

SHAPES = {"layers.0.q_proj": (9, 12), "layers.0.v_proj": (6, 12)}
START = make_adapter(50, SHAPES, 4, 0.7)


def near(start: Adapter, seed: int, rank: int, size: float, scale: float) -> Adapter:
    """Trained from this start: every factor moved by about `size`."""
    rng = np.random.default_rng(seed)
    modules = {}
    for name, f in truncate(start, rank).items():
        b = f.b * np.float32(f.scale / scale)
        a_step = size * rng.standard_normal(f.a.shape, dtype=np.float32)
        b_step = size * rng.standard_normal(f.b.shape, dtype=np.float32)
        modules[name] = Factors(f.a + a_step, b + b_step, scale)
    return Adapter(modules)


def dense_change(adapter: Adapter, start: Adapter | None) -> Deltas:
    now = dense_deltas(adapter)
    return now if start is None else add(now, dense_deltas(truncate(start, adapter.rank)), -1.0)


@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, 4),
    size=st.floats(0.05, 3.0),
    share=st.floats(0.01, 0.99),
    begun=st.booleans(),
)
def test_clipping_ends_at_the_limit_on_the_way_back_to_the_start(
    seed: int, rank: int, size: float, share: float, begun: bool
) -> None:
    start = START if begun else None
    adapter = near(START, seed, rank, size, 16 / rank)
    whole = frobenius(dense_change(adapter, start))
    assert change_norm(adapter, start) == pytest.approx(whole, rel=1e-5)
    clipped = clip_change(adapter, start, share * whole)
    assert frobenius(dense_change(clipped, start)) == pytest.approx(share * whole, rel=1e-4)
    for name, f in clipped.items():
        begin, end = START[name], adapter[name]
        assert f.a.shape == end.a.shape
        if begun:  # the same t in A and in B, in every module
            way_a, done_a = end.a - begin.a[:rank], f.a - begin.a[:rank]
            t = float(np.vdot(way_a, done_a) / np.vdot(way_a, way_a))
            assert 0.0 < t < 1.0
            assert np.allclose(done_a, t * way_a, atol=1e-4)
        else:
            assert np.array_equal(f.a, end.a)
            assert np.allclose(f.b, share * end.b, rtol=1e-4)


def test_a_change_within_the_limit_is_left_as_it_is() -> None:
    adapter = near(START, 3, 2, 0.5, 8.0)
    limit = 1.5 * change_norm(adapter, START)
    clipped = clip_change(adapter, START, limit)
    for name, f in clipped.items():
        assert np.allclose(f.a, adapter[name].a, atol=1e-6)
        assert np.allclose(f.b, adapter[name].b, atol=1e-6)


def reply_of(name: str, adapter: Adapter) -> Reply:
    return replied(adapter, name)


def clients(**values: float) -> ClientsSettings:
    layer = {"clients." + name.replace("_", "-"): value for name, value in values.items()}
    return run_settings(layer).clients


HONEST = [near(START, seed, 2, 0.1, 8.0) for seed in range(4)]


COHORT = [Asked(member_named(f"client-{k}"), LocalRule()) for k in range(len(HONEST))]


def scaled(adapter: Adapter, factor: float) -> Adapter:
    return Adapter({n: Factors(f.a, f.b * np.float32(factor), f.scale) for n, f in adapter.items()})


def admitted(*adapters: Adapter) -> Admitted:
    replies = [reply_of(f"client-{k}", adapter) for k, adapter in enumerate(adapters)]
    return Admitted(replies, [], [])


def test_a_change_a_thousand_times_the_median_is_excluded_and_named() -> None:
    huge = scaled(HONEST[2], 1e5)
    found = guard(admitted(HONEST[0], huge, HONEST[1]), COHORT, START, clients())
    assert [reply.client for reply in found.replies] == ["client-0", "client-2"]
    (rejection,) = found.rejected
    assert rejection.client == "client-1"
    ratio = frobenius(dense_change(huge, START)) / np.median(
        [frobenius(dense_change(x, START)) for x in (HONEST[0], huge, HONEST[1])]
    )
    said = re.search(r"([\d.e+]+) times the median", rejection.reason)
    assert said is not None
    assert float(said[1]) == pytest.approx(ratio, rel=0.01)


def test_honest_replies_pass_as_they_are() -> None:
    before = admitted(*HONEST)
    assert guard(before, COHORT, START, clients()).replies == before.replies


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_nobody_is_out_of_line(count: int) -> None:
    before = admitted(HONEST[0], scaled(HONEST[1], 1e5))
    few = Admitted(before.replies[:count], [], [])
    assert guard(few, COHORT, START, clients()) is few


def test_the_guard_can_be_turned_off() -> None:
    before = admitted(HONEST[0], scaled(HONEST[2], 1e5), HONEST[1])
    assert guard(before, COHORT, START, clients(max_norm_ratio=0.0)) is before


def test_clipping_touches_only_what_is_too_large() -> None:
    large = scaled(HONEST[2], 3.0)
    found = guard(
        admitted(HONEST[0], large, HONEST[1]), COHORT, START, clients(clip_norm_ratio=1.5)
    )
    assert found.rejected == []
    sizes = [frobenius(dense_change(reply.adapter, START)) for reply in found.replies]
    median = np.median([frobenius(dense_change(x, START)) for x in (HONEST[0], large, HONEST[1])])
    assert sizes[1] == pytest.approx(1.5 * median, rel=1e-4)
    assert pack(found.replies[0].adapter) == pack(HONEST[0])


def test_no_change_at_all_excludes_nobody() -> None:
    still = truncate(START, 2)
    assert guard(admitted(still, still, HONEST[0]), COHORT, START, clients()).rejected == []


def objective(points: np.ndarray, shares: np.ndarray, at: np.ndarray) -> float:
    return float(shares @ np.linalg.norm(points - at, axis=1))


@given(seed=st.integers(0, 2**20), count=st.integers(2, 7), dimension=st.integers(1, 5))
def test_the_weights_give_the_geometric_median(seed: int, count: int, dimension: int) -> None:
    rng = np.random.default_rng(seed)
    points, shares = rng.standard_normal((count, dimension)), rng.random(count) + 0.1
    shares /= shares.sum()
    weights = np.array(geometric_median_weights(points @ points.T, list(shares)))
    assert weights.min() >= 0.0
    assert weights.sum() == pytest.approx(1.0)
    best = objective(points, shares, points.T @ weights)
    others = [*points, shares @ points]
    others += [points.T @ weights + 0.02 * rng.standard_normal(dimension) for _ in range(50)]
    assert best <= min(objective(points, shares, other) for other in others) + 1e-3


def test_a_minority_cannot_drag_the_median_away() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((7, 4))
    attacked = points.copy()
    attacked[4:] *= 1e6
    weights = np.array(geometric_median_weights(attacked @ attacked.T, [1 / 7] * 7))
    spread = np.linalg.norm(points[:4] - points[:4].mean(axis=0), axis=1).max()
    assert np.linalg.norm(attacked.T @ weights - points[:4].mean(axis=0)) < 5 * spread
    assert np.linalg.norm(attacked.mean(axis=0)) > 1e4 * spread


def test_clients_that_agree_keep_their_shares() -> None:
    same = np.ones((3, 3))
    assert geometric_median_weights(same, [0.5, 0.3, 0.2]) == pytest.approx([0.5, 0.3, 0.2])


# B is the client's own: A alone travels, and the server sees a B of zero.

OWN_B = [Asked(member_named(f"client-{k}"), LocalRule(sends="A", keeps_b=True)) for k in range(4)]
FLAT = Adapter({n: Factors(f.a, np.zeros_like(f.b), 1.0) for n, f in START.items()})


def moved_a(seed: int, size: float, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for name, f in truncate(FLAT, rank).items():
        step = size * rng.standard_normal(f.a.shape, dtype=np.float32)
        modules[name] = Factors(f.a + step, f.b, 1.0)
    return Adapter(modules)


def dense_step(adapter: Adapter) -> float:
    """||A - A_0|| over all modules, in float64."""
    pairs = [(f.a.astype(float), FLAT[n].a[: f.rank].astype(float)) for n, f in adapter.items()]
    return float(np.sqrt(sum(((a - begun) ** 2).sum() for a, begun in pairs)))


def test_of_a_method_that_keeps_b_the_step_of_a_is_measured() -> None:
    honest = [moved_a(seed, 0.1) for seed in range(3)]
    huge = moved_a(7, 300.0)
    found = guard(admitted(*honest, huge), OWN_B, FLAT, clients())
    assert [reply.client for reply in found.replies] == ["client-0", "client-1", "client-2"]
    (rejection,) = found.rejected
    said = re.search(r"norm ([\d.e+]+),", rejection.reason)
    assert said is not None
    assert float(said[1]) == pytest.approx(dense_step(huge), rel=0.01)


def test_clipping_draws_a_alone_back_where_b_never_travels() -> None:
    honest, large = [moved_a(seed, 0.1) for seed in range(3)], moved_a(7, 2.0)
    found = guard(admitted(*honest, large), OWN_B, FLAT, clients(clip_norm_ratio=1.5))
    sizes = [dense_step(adapter) for adapter in (*honest, large)]
    clipped = found.replies[3].adapter
    assert dense_step(clipped) == pytest.approx(1.5 * np.median(sizes), rel=1e-5)
    for name, f in clipped.items():
        whole, way = large[name].a - FLAT[name].a[:2], f.a - FLAT[name].a[:2]
        t = float(np.vdot(way, whole) / np.vdot(whole, whole))
        assert np.allclose(way, t * whole, atol=1e-5)
    assert [pack(r.adapter) for r in found.replies[:3]] == [pack(adapter) for adapter in honest]


def test_a_step_that_is_rounding_excludes_nobody() -> None:
    still = truncate(FLAT, 2)
    assert (
        guard(
            admitted(still, still, honest_step := moved_a(1, 0.1)), OWN_B, FLAT, clients()
        ).rejected
        == []
    )
    assert step_norm(still, FLAT) == 0.0
    assert step_norm(honest_step, FLAT) == pytest.approx(dense_step(honest_step), rel=1e-5)


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (2, 4, 1, 3)])
def test_robust_weights_of_a_method_that_keeps_b_are_those_of_the_steps_of_a(
    ranks: tuple[int, ...],
) -> None:
    adapters = [moved_a(k, 0.1, rank) for k, rank in enumerate(ranks[:3])]
    adapters.append(moved_a(9, 200.0, ranks[3]))
    replies = [reply_of(f"client-{k}", adapter) for k, adapter in enumerate(adapters)]
    rows = []
    for adapter in adapters:
        row = []
        for name, f in adapter.items():
            whole = np.zeros((4, f.a.shape[1]))
            whole[: f.rank] = f.a.astype(float) - FLAT[name].a[: f.rank]
            row.append(whole.ravel())
        rows.append(np.concatenate(row))
    points = np.array(rows)
    expected = geometric_median_weights(points @ points.T, [0.25] * 4)
    changes = changes_of(replies, FLAT, own_b=True)
    found = [update.weight for update in weigh(replies, "geometric-median", changes)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert found[3] < 1e-2
