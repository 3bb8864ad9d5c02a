"""FedSA-LoRA has a model for each client: W + s_k B_k A, where B_k never leaves the client.

The test plays the clients that keep their B, in float32 beside the code and in float64 beside the
formula.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm, rescale
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, Dense, dense_deltas, distance, double, frobenius
from tests.strategies.rounds import EQUAL, MEMBERS, SHAPES, Client, shares_of

PERSONAL = [n for n in STRATEGIES if make_strategy(n).properties.personal]


@dataclass
class Site:
    """What one client holds: its own s B, on both sides."""

    client: Client
    kept: dict[str, np.ndarray[tuple[int, int], np.dtype[np.float32]]]
    exact: dict[str, Dense]


def moves(client: Client, seed: list[int]) -> dict[str, tuple[Dense, Dense]]:
    step = np.random.default_rng(seed)
    return {
        name: (step.normal(size=(client.rank, n)) / 4, step.normal(size=(m, client.rank)) / 4)
        for name, (m, n) in SHAPES.items()
    }


def test_there_is_one_personal_method() -> None:
    assert PERSONAL == ["fedsa-lora"]


@pytest.mark.parametrize("name", PERSONAL)
def test_each_clients_own_model_follows_the_papers_formula(name: str) -> None:
    strategy, begin = make_strategy(name), draw(SHAPES, 4, seed=3, scale=1.0)
    model, shared = strategy.begin(begin), {n: double(f.a) for n, f in begin.items()}
    zeros = {n: np.zeros((m, 4), np.float32) for n, (m, _) in SHAPES.items()}
    sites = [Site(c, dict(zeros), {n: double(b) for n, b in zeros.items()}) for c in EQUAL]
    for number, members in enumerate(MEMBERS):
        present = [sites[k] for k in members]
        shares = shares_of([site.client for site in present])
        updates, mean = [], {n: 0.0 * a for n, a in shared.items()}
        for site in present:
            client, moved = site.client, moves(site.client, [number, site.client.examples])
            rule = strategy.local_rule(model, client.name)
            assert (rule.trains, rule.sends, rule.receives) == ("both", "A", "A")
            assert rule.keeps_b
            assert model.start is not None
            seen = {}
            for n, f in rescale(model.start, client.scale).items():
                a = (f.a + moved[n][0]).astype(np.float32)
                site.kept[n] = (site.kept[n] + moved[n][1]).astype(np.float32)
                seen[n] = Factors(a, np.zeros_like(f.b), client.scale)
                site.exact[n] = site.exact[n] + client.scale * moved[n][1]
                mean[n] = mean[n] + shares[client.name] * (shared[n] + moved[n][0])
            updates.append(Update(client.name, shares[client.name], Adapter(seen)))
        model, shared = strategy.aggregate(model, Cohort(updates)).model, mean
        for site in sites:  # those that were absent too
            expected = {n: b @ shared[n] for n, b in site.exact.items()}
            assert frobenius(expected) > 0.1 or number == 0
            assert distance(own_model(model.start, site), expected) <= 1e-6 * frobenius(expected)


def own_model(start: Adapter | None, site: Site) -> Deltas:
    """s_k B_k A."""
    assert start is not None
    return {n: site.client.scale * double(b) @ double(start[n].a) for n, b in site.kept.items()}


@pytest.mark.parametrize("name", PERSONAL)
def test_the_server_sends_the_mean_of_a_and_a_b_of_zero(name: str) -> None:
    """Whatever B a client might send all the same."""
    strategy = make_strategy(name)
    updates = [
        Update(str(k), p, make_adapter(k, SHAPES, 4, k + 1.0)) for k, p in ((0, 0.7), (1, 0.3))
    ]
    after = strategy.aggregate(strategy.begin(draw(SHAPES, 4, 3, 2.0)), Cohort(updates)).model
    assert after.merged is None
    assert after.start is not None
    assert norm(after.start) == 0.0
    for n, f in after.start.items():
        expected = 0.7 * double(updates[0].adapter[n].a) + 0.3 * double(updates[1].adapter[n].a)
        np.testing.assert_allclose(f.a, expected, rtol=1e-5, atol=1e-7)
        assert f.scale == 1.0
    assert frobenius(dense_deltas(after.start)) == 0.0
