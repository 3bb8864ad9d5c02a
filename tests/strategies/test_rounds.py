"""Several rounds of each strategy against its paper's formula, in dense float64.

The oracle keeps its own state and makes the same simulated client steps beside the code: a client
takes the first r_k directions of what it is sent, writes them at its own scale and moves by a
random step. Nothing of the oracle's state ever comes from the code under test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import rescale, truncate
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import GlobalModel, Update
from tests.dense_oracle import (
    Deltas,
    Dense,
    dense_deltas,
    dense_sum,
    distance,
    double,
    frobenius,
    mean_of_padded_factors,
)

SHAPES = {"layers.1.q_proj": (9, 14), "layers.11.q_proj": (14, 6)}
ROUNDS = 5
Pair = tuple[Dense, Dense]


@dataclass(frozen=True)
class Client:
    rank: int
    scale: float
    num_examples: int


MIXED = [Client(8, 16 / 8, 300), Client(2, 16 / 2**0.5, 100), Client(5, 1.0, 50)]
EQUAL = [Client(4, 16 / 4, 300), Client(4, 16 / 4**0.5, 100), Client(4, 0.5, 50)]


class Oracle(Protocol):
    """A method in dense float64: what a client starts from, and the model after a round."""

    def sent(self, client: Client, module: str) -> Pair | None:
        """A and s B as the client trains them, or None for fresh factors."""

    def round(self, trained: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> None:
        """Each client's A and s B, by module."""

    def delta(self) -> Deltas:
        """The global model less W."""


@dataclass
class SumOfDeltas:
    """FLoRA: W <- W + sum_k p_k s_k B_k A_k, and every client begins afresh."""

    held: Deltas = field(default_factory=lambda: {n: np.zeros(s) for n, s in SHAPES.items()})

    def sent(self, client: Client, module: str) -> Pair | None:
        return None

    def round(self, trained: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> None:
        for adapter, weight in zip(trained, weights, strict=True):
            for name, (a, b) in adapter.items():
                self.held[name] = self.held[name] + weight * (b @ a)

    def delta(self) -> Deltas:
        return self.held


@dataclass
class MeanOfFactors:
    """FedAvg: A <- sum p_k A_k, s B <- sum p_k s_k B_k; smaller ranks fill up with zeros."""

    a: dict[str, Dense]
    b: dict[str, Dense]

    def sent(self, client: Client, module: str) -> Pair | None:
        return self.a[module][: client.rank], self.b[module][:, : client.rank]

    def round(self, trained: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> None:
        for name in self.a:
            self.a[name], self.b[name] = 0.0 * self.a[name], 0.0 * self.b[name]
            for adapter, weight in zip(trained, weights, strict=True):
                a, b = adapter[name]
                self.a[name][: len(a)] += weight * a
                self.b[name][:, : len(a)] += weight * b

    def delta(self) -> Deltas:
        return {name: self.b[name] @ self.a[name] for name in self.a}


def shared_factors(fresh: Adapter) -> MeanOfFactors:
    return MeanOfFactors(
        {name: double(f.a) for name, f in fresh.items()},
        {name: double(f.b) for name, f in fresh.items()},
    )


ORACLES: dict[str, Callable[[Adapter], Oracle]] = {
    "flora": lambda fresh: SumOfDeltas(),
    "fedavg": shared_factors,
    "zero-padding": shared_factors,
}

CASES = [
    pytest.param(name, clients, id=f"{name}-{'mixed' if clients is MIXED else 'equal'}")
    for name in STRATEGIES
    for clients in (EQUAL, MIXED)
    if clients is EQUAL or make_strategy(name).properties.mixed_ranks
]
AVERAGING = [case for case in CASES if ORACLES.get(str(case.values[0])) is shared_factors]


def train(model: GlobalModel, client: Client, fresh: Adapter, step: np.random.Generator) -> Adapter:
    """The client's side, in the code's own float32."""
    start = fresh if model.start is None else model.start
    start = rescale(truncate(start, client.rank), client.scale)
    modules = {}
    for name, f in start.items():
        a, b = f.a + step.normal(size=f.a.shape) / 4, f.b + step.normal(size=f.b.shape) / 4
        modules[name] = Factors(a.astype(np.float32), b.astype(np.float32), f.scale)
    return Adapter(modules)


def train_oracle(
    oracle: Oracle, client: Client, fresh: Adapter, step: np.random.Generator
) -> dict[str, Pair]:
    """The same, in float64: A and s B."""
    modules = {}
    for name in SHAPES:
        rows = double(fresh[name].a[: client.rank])
        a, b = oracle.sent(client, name) or (rows, np.zeros((SHAPES[name][0], client.rank)))
        a = a + step.normal(size=a.shape) / 4
        modules[name] = a, b + client.scale * step.normal(size=b.shape) / 4
    return modules


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_has_its_formula_here(name: str) -> None:
    assert name in ORACLES, f"write the dense formula of {name} down in ORACLES"


@pytest.mark.parametrize(("name", "clients"), CASES)
def test_several_rounds_follow_the_papers_formula(name: str, clients: list[Client]) -> None:
    strategy = make_strategy(name)
    begin = draw(SHAPES, max(client.rank for client in clients), seed=3, scale=1.0)
    model, oracle = strategy.begin(begin), ORACLES[name](begin)
    for server_round in range(ROUNDS):
        # Not all take part each time, and once only the smallest ranks do.
        present = clients if server_round != 2 else clients[1:]
        examples = sum(client.num_examples for client in present)
        weights = [client.num_examples / examples for client in present]
        fresh = draw(SHAPES, 8, seed=50 + server_round, scale=1.0)
        seeds = [[server_round, k] for k in range(len(present))]
        sent = [
            train(model, client, fresh, np.random.default_rng(seed))
            for client, seed in zip(present, seeds, strict=True)
        ]
        dense_sent = [
            train_oracle(oracle, client, fresh, np.random.default_rng(seed))
            for client, seed in zip(present, seeds, strict=True)
        ]
        updates = [
            Update(f"client-{k}", weight, adapter)
            for k, (weight, adapter) in enumerate(zip(weights, sent, strict=True))
        ]
        model = strategy.aggregate(model, updates)
        oracle.round(dense_sent, weights)
        expected = oracle.delta()
        assert frobenius(expected) > 1.0
        assert distance(dense_deltas(model.total()), expected) <= 1e-6 * frobenius(expected)


@pytest.mark.parametrize(("name", "clients"), AVERAGING)
@pytest.mark.parametrize("start_rank", [8, 2])  # above and below the clients' ranks
def test_one_round_of_averaging_is_the_sum_of_its_cross_terms(
    name: str, clients: list[Client], start_rank: int
) -> None:
    strategy = make_strategy(name)
    model = strategy.begin(draw(SHAPES, start_rank, seed=3, scale=1.0))
    weights = [0.5, 0.2, 0.3]
    adapters = [
        train(GlobalModel(), client, draw(SHAPES, 8, 0, 1.0), np.random.default_rng(k))
        for k, client in enumerate(clients)
    ]
    updates = [Update(str(k), weights[k], adapter) for k, adapter in enumerate(adapters)]
    expected = dict(mean_of_padded_factors(adapters, weights))
    after = strategy.aggregate(model, updates)
    assert distance(dense_deltas(after.total()), expected) <= 1e-6 * frobenius(expected)


@pytest.mark.parametrize(("name", "clients"), AVERAGING)
def test_averaging_is_exact_where_the_clients_share_their_rows(
    name: str, clients: list[Client]
) -> None:
    shared = draw(SHAPES, 8, seed=4, scale=1.0)
    step, weights = np.random.default_rng(5), [0.5, 0.2, 0.3]
    adapters = []
    for client in clients:
        modules = {}
        for module, f in truncate(shared, client.rank).items():
            b = step.normal(size=f.b.shape).astype(np.float32)
            modules[module] = Factors(f.a, b, client.scale)
        adapters.append(Adapter(modules))
    updates = [Update(str(k), weights[k], adapter) for k, adapter in enumerate(adapters)]
    model = make_strategy(name).begin(truncate(shared, max(client.rank for client in clients)))
    after = dense_deltas(make_strategy(name).aggregate(model, updates).total())
    same_rank = len({client.rank for client in clients}) == 1
    expected = dense_sum(adapters, weights)
    error = distance(after, expected) / frobenius(expected)
    assert error <= 1e-6 if same_rank else error > 0.05  # the zeros still dilute


@pytest.mark.parametrize("name", ["flora"])
def test_the_sum_of_many_rounds_does_not_drift(name: str) -> None:
    strategy, model, held = make_strategy(name), GlobalModel(), SumOfDeltas()
    for server_round in range(30):
        fresh = draw(SHAPES, 8, seed=server_round, scale=1.0)
        seeds = [[server_round, k] for k in range(len(MIXED))]
        sent = [
            train(model, client, fresh, np.random.default_rng(seed))
            for client, seed in zip(MIXED, seeds, strict=True)
        ]
        model = strategy.aggregate(model, [Update(str(k), 1 / 3, x) for k, x in enumerate(sent)])
        for module, delta in dense_sum(sent, [1 / 3] * 3).items():
            held.held[module] = held.held[module] + delta
        assert model.merged is not None
        for module, factors in model.merged.items():
            assert factors.rank <= min(SHAPES[module])
    assert distance(dense_deltas(model.total()), held.held) <= 1e-6 * frobenius(held.held)
