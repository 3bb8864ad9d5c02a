"""What a method says of its bytes, against the values that the server really sends and receives.

The formulas are read as they stand: `b (r D + min(S T D, m n))`, with b = 1 for one value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from adapters.adapter import Adapter, Delta, Dense
from server.pieces import distinct, gained_at_first, in_pieces, start_piece
from strategies.registry import STRATEGIES
from strategies.strategy import Aggregated, GlobalModel, Strategy
from tests.strategies.cohorts import (
    CONFIGURATIONS,
    SHAPES,
    begun,
    cohorts,
    made_of,
    reply_of,
    total,
)
from wire.pieces import Piece
from wire.rules import CONTROL, LocalRule

ROUNDS = 3
KNOWN = {"b", "r", "r_k", "R", "S", "T", "M", "N", "D", "m", "n", "r_kept", "min"}


def value(formula: str, names: Mapping[str, float]) -> float:
    """A formula in which products have no sign: a space stands between factors."""
    tokens = re.findall(r"\w+|[(),+]", formula)
    assert "".join(tokens) == formula.replace(" ", "")
    written = ""
    for before, token in zip(["(", *tokens], tokens, strict=False):
        assert token in "(),+" or token in KNOWN or token.isdigit(), token
        starts = token == "(" or token[0].isalnum()
        ends = before == ")" or (before[0].isalnum() and before != "min")
        written += f"*{token}" if starts and ends else token
    return float(eval(written, {"__builtins__": {}, "min": min}, dict(names)))


def of_turn(formula: str, rounds: int) -> str:
    """The part that holds after this many rounds, where they take turns."""
    parts = formula.split(", then ")
    return parts[rounds % len(parts)]


def promised(
    formula: str, rank: int, ranks: tuple[int, ...], rounds: int, kept: Mapping[str, int]
) -> float:
    """Values of all modules after this many rounds."""
    return sum(
        value(
            of_turn(formula, rounds),
            {
                **{"b": 1, "r": rank, "r_k": rank, "R": max(ranks), "S": sum(ranks), "T": rounds},
                **{"M": m, "N": n, "D": m + n, "m": m, "n": n, "r_kept": kept.get(name, 0)},
            },
        )
        for name, (m, n) in SHAPES.items()
    )


def values(delta: Delta | None, factors: str = "both") -> int:
    if delta is None:
        return 0
    return sum(
        f.values.size
        if isinstance(f, Dense)
        else (factors != "B") * f.a.size + (factors != "A") * f.b.size
        for f in delta.values()
    )


@dataclass
class Site:
    """A client that is there in every round and keeps what it was sent."""

    strategy: Strategy
    pieces: tuple[Piece, ...] = ()
    held: frozenset[str] = frozenset()
    written_anew: bool = False

    def receive(self, before: GlobalModel, made: Aggregated, rule: LocalRule) -> int:
        """The values that travel to it with the next model."""
        after = made.model
        self.pieces, _ = in_pieces(self.pieces, before, after, "float32", made.gained)
        versions = {piece.version for piece in self.pieces}
        self.written_anew = not self.held <= versions
        lacking = [p for p in distinct(self.pieces) if p.version not in self.held]
        self.held = frozenset(versions)
        sent = sum(piece.delta.num_parameters for piece in lacking)
        both = rule.receives == "both"
        if both and start_piece(self.pieces, after.start, "float32"):
            return sent
        control = after.state.get(CONTROL) if rule.control else None
        corrected = values(control) if isinstance(control, Adapter) else 0
        return sent + values(after.start, rule.receives) + corrected


FIXED = ("b r D", "b r M", "b r N")
"""Formulas of what depends on nothing but the rank: here the bound is what travels."""
PUBLISHED = {name: CONFIGURATIONS[name] for name in STRATEGIES if name != "flora-warm"}


@pytest.mark.parametrize(("strategy", "ranks"), cohorts(PUBLISHED))
def test_bytes_up_are_what_a_client_sends(strategy: Strategy, ranks: tuple[int, ...]) -> None:
    model = begun(strategy, ranks)
    for rounds in range(ROUNDS):
        for k, rank in enumerate(ranks):
            rule = strategy.local_rule(model, f"client-{k}")
            update = reply_of(strategy, model, f"client-{k}", rank, seed=k)
            wanted = promised(strategy.properties.bytes_up, rank, ranks, rounds, {})
            assert values(update.adapter, rule.sends) + values(update.control) == wanted
        model = made_of(strategy, model, ranks, rounds).model


@pytest.mark.parametrize(("strategy", "ranks"), cohorts(CONFIGURATIONS))
def test_bytes_down_are_at_most_what_is_promised_and_soon_reach_it(
    strategy: Strategy, ranks: tuple[int, ...]
) -> None:
    """Or all of merged, in a round in which the pieces have outgrown it and are written anew."""
    before, first, site = GlobalModel(), begun(strategy, ranks), Site(strategy)
    made = Aggregated(first, gained_at_first(strategy, first))
    kept, sent, wanted = dict.fromkeys(SHAPES, 0), 0.0, 0.0
    for rounds in range(ROUNDS):
        bound = promised(strategy.properties.bytes_down, ranks[0], ranks, rounds, kept)
        model = made.model
        values_now = site.receive(before, made, strategy.local_rule(model, "client-0"))
        whole = promised("b (R D + m n)", ranks[0], ranks, rounds, kept)
        assert values_now <= (max(bound, whole) if site.written_anew else bound)
        if rounds and strategy.properties.bytes_down in FIXED and not site.written_anew:
            assert values_now == bound
        if rounds:  # before round one some send nothing at all
            sent, wanted = sent + values_now, wanted + bound
        deltas = total(model)
        before = model
        made = made_of(strategy, before, ranks, rounds)
        for name, delta in total(made.model).items():
            moved = np.linalg.matrix_rank(delta - deltas[name], 1e-5 * np.linalg.norm(delta))
            kept[name] = int(moved)
    if strategy in PUBLISHED.values():  # less where the largest rank exceeds a module's dimensions
        assert sent >= 0.6 * wanted


def test_formulas_are_read_as_written() -> None:
    names = {"b": 1, "r": 2, "D": 10, "S": 3, "T": 4, "m": 7, "n": 9}
    assert value("b (r + min(S T, m, n)) D", names) == 90
    assert value("b (r + min(r (T + 1), m, n)) D", names) == 90
    assert value("b (r D + min(S T D, m n))", names) == 83
    assert [of_turn("b r M, then b r N", rounds) for rounds in (0, 1, 2)] == [
        "b r M",
        "b r N",
        "b r M",
    ]
