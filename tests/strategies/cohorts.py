"""Cohorts that obey a strategy's rule, and dense views of a model, for the tests beside this file.

What a client may reply is the method's to say (`Strategy.local_rule`): a factor that does not train
or does not travel is as it was in `start`, and directions that it keeps frozen come back with it.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import beyond, stack
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Aggregated, Cohort, GlobalModel, Strategy, Update
from strategies.warm_start import POLICIES, RANDOM
from tests.adapter_generators import make_factors
from tests.dense_oracle import Deltas, dense_deltas, distance, frobenius
from wire.model import pack_model, unpack_model
from wire.rules import BOTH, LocalRule

SHAPES = {
    "layers.1.q_proj": (8, 14),
    "layers.11.q_proj": (14, 8),
    "layers.1.up_proj": (21, 24),
    "lm_head": (16, 5),
}
# The largest rank equals a dimension of one module, exceeds the smaller one of others, and is less
# than both of up_proj.
MIXED = (16, 5, 5, 1)
EQUAL = (5, 5, 5, 5)
EXAMPLES = (350, 120, 330, 200)

CONFIGURATIONS: dict[str, Strategy] = {
    **{name: make_strategy(name) for name in STRATEGIES},
    "florist-lossless": make_strategy("florist", energy=1.0),
    "flora-half": make_strategy("flora", energy=0.5),
    **{
        f"{name}-{policy}": make_strategy(name, policy=policy)
        for name in ("flora", "florist")
        for policy in POLICIES
        if policy != RANDOM
    },
}


def cohorts(strategies: dict[str, Strategy]) -> list[object]:
    """Parameters (strategy, ranks): each at equal ranks, and at mixed ones if it takes them."""
    return [
        pytest.param(strategy, ranks, id=f"{name}-{'mixed' if ranks is MIXED else 'equal'}")
        for name, strategy in strategies.items()
        for ranks in (EQUAL, MIXED)
        if ranks is EQUAL or strategy.properties.mixed_ranks
    ]


def trained(seed: int, rank: int) -> Adapter:
    """What a free client might send: its own scale rule, factors of ordinary size."""
    rng = np.random.default_rng(seed)
    scale = 16 / rank if seed % 2 else 8 / rank**0.5
    return Adapter({name: make_factors(rng, shape, rank, scale) for name, shape in SHAPES.items()})


def obeying(rule: LocalRule, start: Adapter | None, free: Adapter) -> Adapter:
    """`free` as the server sees it from a client that obeys the rule and began from `start`."""
    if start is None:
        return free
    still = {"A", "B"} - {rule.trains} - {BOTH} if rule.trains != BOTH else set()
    if rule.sends != BOTH:
        still |= {"A", "B"} - {rule.sends}
    modules = {}
    for name, f in free.items():
        begun, r = start[name], f.rank
        a = begun.a[:r] if "A" in still else f.a
        b = begun.b[:, :r] * np.float32(begun.scale / f.scale) if "B" in still else f.b
        modules[name] = Factors(a, b, f.scale)
    whole = Adapter(modules)
    if rule.freezes_tail and start.rank > whole.rank:
        whole = stack([whole, beyond(start, whole.rank)], [1.0, 1.0])
    return whole


def asked_rank(rule: LocalRule, rank: int) -> int:
    """The rank that a client of this rank trains under this rule."""
    return min(rank, rule.rank) if rule.rank else rank


def reply_of(
    strategy: Strategy, model: GlobalModel, client: str, rank: int, seed: int, weight: float = 1.0
) -> Update:
    """One client's reply; the same seed and rank give the same free adapter."""
    rule = strategy.local_rule(model, client)
    free = trained(seed, asked_rank(rule, rank))
    control = None
    if rule.control:
        gradients = trained(seed + 50, asked_rank(rule, rank))
        control = Adapter({n: Factors(f.a, f.b, 1.0) for n, f in gradients.items()})
    return Update(client, weight, obeying(rule, model.start, free), control)


def replies_to(
    strategy: Strategy, model: GlobalModel, ranks: Sequence[int], seed: int = 0
) -> list[Update]:
    """A whole cohort's replies, each obeying the strategy's own rule."""
    return [
        reply_of(strategy, model, f"client-{k}", rank, 100 * seed + k, count / sum(EXAMPLES))
        for k, (rank, count) in enumerate(zip(ranks, EXAMPLES, strict=True))
    ]


def begun(strategy: Strategy, ranks: Sequence[int]) -> GlobalModel:
    """Before round one; what stands for the base's leading directions has a B that is not zero."""
    if strategy.properties.begins_from_base:
        return strategy.begin(trained(8, max(ranks)))
    return strategy.begin(draw(SHAPES, max(ranks), seed=1, scale=2.0))


def made_of(strategy: Strategy, model: GlobalModel, ranks: Sequence[int], seed: int) -> Aggregated:
    """What the method makes of a whole cohort's replies."""
    return strategy.aggregate(model, Cohort(replies_to(strategy, model, ranks, seed)))


def model_after(strategy: Strategy, ranks: Sequence[int], rounds: int) -> GlobalModel:
    model = begun(strategy, ranks)
    for number in range(rounds):
        model = made_of(strategy, model, ranks, seed=number + 1).model
    return model


def total(model: GlobalModel) -> Deltas:
    """The dense global model less W."""
    return dense_deltas(model.total(), like=trained(0, 1))


def frozen(model: GlobalModel) -> Deltas:
    """The dense delta of `merged`."""
    return dense_deltas(model.merged, like=trained(0, 1))


def assert_close(x: Deltas, y: Deltas, relative: float = 2e-6) -> None:
    assert distance(x, y) <= relative * max(frobenius(x), frobenius(y))
    assert frobenius(y) > 0.0  # zeros would agree with each other for nothing


def packed(model: GlobalModel) -> dict[str, bytes]:
    """Everything of a model that a method makes, as it is saved."""
    return pack_model(model.merged, model.start, state=model.state)


def reloaded(model: GlobalModel) -> GlobalModel:
    """The model, saved and loaded."""
    return GlobalModel(*unpack_model(packed(model), {}))
