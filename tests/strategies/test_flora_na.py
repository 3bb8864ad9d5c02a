"""FLoRA-NA's mixtures against the dense objective ||sum_k p_k s_k B_k A_k - B A||_F."""

from itertools import pairwise

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from core.errors import AdapterError
from strategies.flora_na import mixed
from strategies.registry import make_strategy
from strategies.strategy import Cohort, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Dense, dense, dense_deltas, dense_sum, distance, double

SHAPES = {"layers.1.q_proj": (12, 20), "layers.11.q_proj": (18, 10)}
WEIGHTS = np.array([0.4, 0.1, 0.3, 0.2])
NEAR, FAR = 0.3, 3.0  # how far clients moved from what they began with


def factors_of(seed: int, apart: float, module: str = "layers.1.q_proj") -> list[Factors]:
    """Clients that began alike and moved apart, each with its own scale."""
    common = make_adapter(seed, SHAPES, 3)[module]
    found = []
    for k in range(len(WEIGHTS)):
        own = make_adapter(100 * seed + k + 1, SHAPES, 3)[module]
        a, b = (common.a + apart * own.a), (common.b + apart * own.b)
        found.append(Factors(a, b, 1.0 + k / 2))
    return found


def wanted(factors: list[Factors]) -> Dense:
    return double(sum(p * dense(f) for p, f in zip(WEIGHTS, factors, strict=True)))


def coefficients(mixture: Dense, parts: list[Dense]) -> Dense:
    """Those of the parts in this mixture, which must be one of them."""
    columns = np.stack([part.ravel() for part in parts], axis=1)
    found, *_ = np.linalg.lstsq(columns, mixture.ravel(), rcond=None)
    assert np.linalg.norm(columns @ found - mixture.ravel()) <= 1e-6 * np.linalg.norm(mixture)
    return double(found)


def mix(c: Dense, parts: list[Dense]) -> Dense:
    return double(np.tensordot(c, np.stack(parts), 1))


# y is solved for last; x was so one step earlier, and settles slower where clients lie far apart.
@pytest.mark.parametrize(("apart", "settled"), [(NEAR, 1e-6), (FAR, 1e-4)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_small_change_of_a_coefficient_improves_the_dense_objective(
    seed: int, apart: float, settled: float
) -> None:
    factors = factors_of(seed, apart)
    found, target = mixed(factors, WEIGHTS), wanted(factors)
    rows, columns = [double(f.a) for f in factors], [f.scale * double(f.b) for f in factors]
    y, x = coefficients(double(found.a), rows), coefficients(double(found.b), columns)
    error = np.linalg.norm(target - dense(found))
    for k in range(len(factors)):
        for step in (-1e-2, 1e-2):
            e = step * np.eye(len(factors))[k]
            b, a = mix(x + e * np.abs(x).max(), columns), mix(y + e * np.abs(y).max(), rows)
            assert np.linalg.norm(target - b @ double(found.a)) > error * (1.0 - settled)
            assert np.linalg.norm(target - double(found.b) @ a) > error * (1.0 - 1e-6)


@pytest.mark.parametrize("apart", [NEAR, FAR])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_nearer_to_the_mean_of_the_deltas_than_fedavg(seed: int, apart: float) -> None:
    updates = []
    for k, p in enumerate(WEIGHTS):
        modules = {name: factors_of(seed, apart, name)[k] for name in SHAPES}
        updates.append(Update(str(k), float(p), Adapter(modules)))
    expected = dense_sum([u.adapter for u in updates], list(WEIGHTS))
    errors = {}
    for name in ("flora-na", "fedavg"):
        strategy = make_strategy(name)
        after = strategy.aggregate(strategy.begin(draw(SHAPES, 3, 1, 1.0)), Cohort(updates)).model
        errors[name] = distance(dense_deltas(after.total()), expected)
    assert errors["flora-na"] < 0.99 * errors["fedavg"]


def test_no_sweep_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of(5, FAR)
    target, errors = wanted(factors), []
    for sweeps in range(8):
        monkeypatch.setattr("strategies.flora_na.SWEEPS", sweeps)
        errors.append(np.linalg.norm(target - dense(mixed(factors, WEIGHTS))))
    assert all(later <= before * (1 + 1e-6) for before, later in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


def test_where_no_client_moved_a_module_its_means_stay() -> None:
    sent = [make_adapter(k, SHAPES, 3) for k in range(2)]
    still = [Adapter({n: Factors(f.a, 0 * f.b, f.scale) for n, f in x.items()}) for x in sent]
    strategy = make_strategy("flora-na")
    updates = [Update(str(k), 0.5, x) for k, x in enumerate(still)]
    after = strategy.aggregate(strategy.begin(draw(SHAPES, 3, 1, 1.0)), Cohort(updates)).model
    assert after.start is not None
    for name, f in after.start.items():
        np.testing.assert_allclose(
            f.a, (sent[0][name].a + sent[1][name].a) / 2, rtol=1e-5, atol=1e-6
        )
        assert not f.b.any()


def test_mixed_ranks_are_refused_by_name() -> None:
    updates = [Update(str(r), 0.5, make_adapter(r, SHAPES, r)) for r in (2, 3)]
    strategy = make_strategy("flora-na")
    with pytest.raises(AdapterError, match=r"layers\.1\.q_proj comes with ranks \[2, 3\]"):
        strategy.aggregate(strategy.begin(draw(SHAPES, 3, 1, 1.0)), Cohort(updates))
