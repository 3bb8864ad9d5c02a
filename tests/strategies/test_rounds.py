"""Several rounds of each strategy against its paper's formula, in dense float64."""

import pytest

from strategies.registry import STRATEGIES
from tests.dense_oracle import dense_deltas, distance, frobenius
from tests.strategies.rounds import (
    CASES,
    EQUAL,
    MEMBERS,
    MIXED,
    WITHOUT_A_GLOBAL_MODEL,
    Client,
    Played,
)

TABLE = [
    pytest.param(name, clients, id=f"{name}-{'mixed' if clients is MIXED else 'equal'}")
    for name, case in CASES.items()
    for clients in (EQUAL, MIXED)
    if clients is EQUAL or case.strategy.properties.mixed_ranks
]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_has_its_formula_here(name: str) -> None:
    assert name in CASES or name in WITHOUT_A_GLOBAL_MODEL, f"write the formula of {name} down"


@pytest.mark.parametrize(("name", "clients"), TABLE)
def test_several_rounds_follow_the_papers_formula(name: str, clients: list[Client]) -> None:
    case = CASES[name]
    played = Played(case, clients)
    for number in range(len(MEMBERS)):
        played.round(number)
        expected = played.oracle.delta()
        found = dense_deltas(played.model.total())
        assert frobenius(expected) > 1.0
        assert distance(found, expected) <= case.tolerance * frobenius(expected)


def test_the_clients_of_hetlora_go_on_at_the_rank_they_pruned_to() -> None:
    played = Played(CASES["hetlora"], MIXED)
    for number in range(len(MEMBERS)):
        played.round(number)
    assert played.pruned == {"big": 3, "small": 2, "middle": 2}
    for client in MIXED:
        rule = CASES["hetlora"].strategy.local_rule(played.model, client.name)
        assert rule.rank == played.pruned[client.name]
