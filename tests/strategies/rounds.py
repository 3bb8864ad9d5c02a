"""Rounds with simulated clients, played twice: by the code in float32, by an oracle in float64.

A client takes the first r_k directions of what it is sent, fills up with fresh ones, writes them at
its own scale and moves by a random step, the same on both sides. Nothing of the oracle's state ever
comes from the code under test.

The signs of singular vectors are free. So each direction's step is turned the way its row of A
lies to a fixed probe: the products are then the same whatever signs a decomposition chose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import beyond, rescale, stack, truncate
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, GlobalModel, Strategy, Update
from strategies.warm_start import POLICIES, RANDOM
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, Dense, add, double
from tests.strategies.oracles import (
    BestOfRank,
    Corrected,
    Decomposed,
    DirectionByDirection,
    LevelByLevel,
    Mean,
    MeanAndResidual,
    Mixtures,
    OneFactor,
    Oracle,
    Pairs,
    Residual,
    Stepping,
    Sum,
    Turned,
    Warm,
    WeighedBySize,
    adaptive,
    momentum,
    products,
)
from wire.rules import BOTH

SHAPES = {"layers.1.q_proj": (9, 14), "layers.11.q_proj": (14, 6)}
PRUNE = 0.75
PROBES = {name: np.random.default_rng(77).normal(size=n) for name, (_, n) in SHAPES.items()}


@dataclass(frozen=True)
class Client:
    name: str
    rank: int
    scale: float
    examples: int


MIXED = [
    Client("big", 8, 16 / 8, 300),
    Client("small", 2, 16 / 2**0.5, 100),
    Client("middle", 6, 1.0, 50),
]
EQUAL = [
    Client("alpha", 4, 16 / 4, 300),
    Client("rslora", 4, 16 / 4**0.5, 100),
    Client("other", 4, 0.5, 50),
]
MEMBERS = ([0, 1, 2], [0, 1, 2], [1, 2], [0, 2], [0, 1, 2], [0, 1, 2])
"""Who takes part, by round; once only the smallest."""


@dataclass(frozen=True)
class Case:
    strategy: Strategy
    oracle: Callable[[Pairs], Oracle]
    trains: tuple[str, ...] = (BOTH,)
    """By the paper, round by round and from the beginning again."""
    tolerance: float = 1e-6


def _warm(name: str, policy: str, energy: float = 0.0) -> Case:
    """Later starts are decompositions of earlier ones, which spread rounding a little."""
    cut = {"energy": energy} if energy else {}
    return Case(
        make_strategy(name, policy=policy, **cut),
        lambda f: Warm(f, policy, energy or 1.0),
        (BOTH,),
        5e-6,
    )


CASES: dict[str, Case] = {
    "flora": Case(make_strategy("flora"), Sum),
    "ideal": Case(make_strategy("ideal"), Sum),
    "fedavg": Case(make_strategy("fedavg"), Mean),
    "zero-padding": Case(make_strategy("zero-padding"), Mean),
    "hetlora": Case(make_strategy("hetlora", prune=PRUNE, min_rank=1), WeighedBySize),
    "flexlora": Case(make_strategy("flexlora"), BestOfRank, tolerance=5e-6),
    "ffa-lora": Case(make_strategy("ffa-lora"), OneFactor, ("B",)),
    "rolora": Case(make_strategy("rolora"), lambda f: OneFactor(f, turns=("B", "A")), ("B", "A")),
    "fedex-lora": Case(make_strategy("fedex-lora"), MeanAndResidual),
    "lora-fair": Case(make_strategy("lora-fair"), Corrected),
    "lora-fair-strong": Case(
        make_strategy("lora-fair", ridge=0.5), lambda f: Corrected(f, ridge=0.5)
    ),
    "florist": Case(make_strategy("florist"), lambda f: Sum(f, energy=0.9)),
    "florist-less": Case(make_strategy("florist", energy=0.6), lambda f: Sum(f, energy=0.6)),
    "frlora": Case(make_strategy("frlora"), Residual),
    "rbla": Case(make_strategy("rbla"), DirectionByDirection),
    "flora-na": Case(make_strategy("flora-na"), Mixtures, tolerance=5e-6),
    "flora-warm": Case(
        make_strategy("flora-warm"), lambda f: Warm(f, "global", 1.0), (BOTH,), 5e-6
    ),
    **{f"flora-{policy}": _warm("flora", policy) for policy in POLICIES if policy != RANDOM},
    **{
        f"florist-{policy}": _warm("florist", policy, energy=0.7)
        for policy in POLICIES
        if policy != RANDOM
    },
}
CASES |= {
    "fedprox": Case(make_strategy("fedprox"), Mean),
    "scaffold": Case(make_strategy("scaffold"), Mean),
    "raflora": Case(make_strategy("raflora"), LevelByLevel, tolerance=5e-6),
    "fedsvd": Case(make_strategy("fedsvd"), Decomposed, ("B",), 5e-6),
    "fedsvd-rarely": Case(
        make_strategy("fedsvd", every=3), lambda f: Decomposed(f, every=3), ("B",), 5e-6
    ),
    "fedrot-lora": Case(make_strategy("fedrot-lora"), Turned, tolerance=5e-6),
    "fedavgm": Case(make_strategy("fedavgm"), lambda f: Stepping(f, momentum(0.5, 1.0))),
    "fedavgm-slow": Case(
        make_strategy("fedavgm", beta=0.9, rate=0.5), lambda f: Stepping(f, momentum(0.9, 0.5))
    ),
    "fedavgm-none": Case(make_strategy("fedavgm", beta=0.0), Mean),
    "fedavgm-over-zero-padding": Case(
        make_strategy("fedavgm", over="zero-padding"), lambda f: Stepping(f, momentum(0.5, 1.0))
    ),
    "fedavgm-over-rolora": Case(
        make_strategy("fedavgm", over="rolora"),
        lambda f: Stepping(f, momentum(0.5, 1.0), turns=("B", "A")),
        ("B", "A"),
    ),
    "fedadam": Case(
        make_strategy("fedadam", rate=0.3),
        lambda f: Stepping(f, adaptive("adam", 0.3)),
        tolerance=5e-6,
    ),
    "fedyogi": Case(
        make_strategy("fedyogi", rate=0.3),
        lambda f: Stepping(f, adaptive("yogi", 0.3)),
        tolerance=5e-6,
    ),
    "fedadam-over-ffa-lora": Case(
        make_strategy("fedadam", over="ffa-lora", rate=0.3),
        lambda f: Stepping(f, adaptive("adam", 0.3), turns=("B",)),
        ("B",),
    ),
}
WITHOUT_A_GLOBAL_MODEL = [n for n in STRATEGIES if make_strategy(n).properties.personal]


def toward(a: Dense, name: str) -> Dense:
    """+1 or -1 for each row of A: the side of the probe on which it lies."""
    return double(np.where(a @ PROBES[name] < 0.0, -1.0, 1.0))


def filled(own: Factors, fresh: Factors, rank: int) -> Factors:
    """Fresh directions, whose delta is zero, up to the client's rank."""
    r = own.rank
    return Factors(
        np.concatenate([own.a, fresh.a[r:rank]]),
        np.concatenate([own.b, np.zeros((len(own.b), rank - r), np.float32)], axis=1),
        own.scale,
    )


def train(
    strategy: Strategy, model: GlobalModel, client: Client, fresh: Adapter, seed: Sequence[int]
) -> Adapter:
    """The client's side in float32; comes back as the server sees it, but not yet pruned."""
    step, rule = np.random.default_rng(seed), strategy.local_rule(model, client.name)
    rank = min(client.rank, rule.rank) if rule.rank else client.rank
    start = truncate(fresh, 0) if model.start is None else truncate(model.start, rank)
    modules = {}
    for name, own in rescale(start, client.scale).items():
        f = filled(own, fresh[name], rank)
        way = toward(double(f.a), name)
        a = f.a + (rule.trains != "B") * way[:, None] * step.normal(size=f.a.shape) / 4
        b = f.b + (rule.trains != "A") * way * step.normal(size=f.b.shape) / 4
        modules[name] = Factors(a.astype(np.float32), b.astype(np.float32), f.scale)
    return Adapter(modules)


def with_tail(strategy: Strategy, model: GlobalModel, client: Client, sent: Adapter) -> Adapter:
    """What the server adds: the directions of start that the client kept frozen."""
    rule = strategy.local_rule(model, client.name)
    if not rule.freezes_tail or model.start is None:
        return sent
    return stack([sent, beyond(model.start, sent.rank)], [1.0, 1.0])


def train_oracle(
    oracle: Oracle, client: Client, rank: int, trains: str, fresh: Adapter, seed: Sequence[int]
) -> Pairs:
    """The same in float64: A and s B."""
    step, sent = np.random.default_rng(seed), oracle.sent(rank)
    pairs = {}
    for name, (m, n) in SHAPES.items():
        a, b = sent[name] if sent else (np.zeros((0, n)), np.zeros((m, 0)))
        r = len(a)
        a = np.concatenate([a, double(fresh[name].a[r:rank])])
        b = np.concatenate([b, np.zeros((m, rank - r))], axis=1)
        way = toward(a, name)
        moved_a = way[:, None] * step.normal(size=a.shape) / 4
        moved_b = client.scale * way * step.normal(size=b.shape) / 4
        pairs[name] = (a + (trains != "B") * moved_a, b + (trains != "A") * moved_b)
    return pairs


def begin_of(strategy: Strategy, rank: int) -> Adapter:
    """What the server begins from: drawn, or standing for the base's leading directions."""
    if strategy.properties.begins_from_base:
        return make_adapter(3, SHAPES, rank)
    return draw(SHAPES, rank, seed=3, scale=2.0)


def pairs_of(adapter: Adapter) -> Pairs:
    return {name: (double(f.a), f.scale * double(f.b)) for name, f in adapter.items()}


@dataclass
class Played:
    """Both sides of a run, round by round."""

    case: Case
    clients: list[Client]
    pruned: dict[str, int] = field(default_factory=dict)
    """The oracle's book of ranks that clients lowered."""
    changes: dict[str, Deltas] = field(default_factory=dict)
    """By the oracle: what each client of the last round changed."""
    moved: Deltas = field(default_factory=dict)
    """By the oracle: what the last round added to the global model."""
    shares: Mapping[str, float] = field(default_factory=dict)
    before: GlobalModel = field(default_factory=GlobalModel)
    updates: list[Update] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """How many directions of the start the updates of the last round began from."""

    def __post_init__(self) -> None:
        begin = begin_of(self.case.strategy, max(client.rank for client in self.clients))
        self.model, self.oracle = self.case.strategy.begin(begin), self.case.oracle(pairs_of(begin))

    def round(self, number: int) -> None:
        """One round on both sides; every second time a client that is asked to prune does so."""
        strategy, before = self.case.strategy, self.model
        present = [self.clients[k] for k in MEMBERS[number]]
        shares = shares_of(present)
        fresh = draw(SHAPES, 8, seed=50 + number, scale=1.0)
        trains = self.case.trains[number % len(self.case.trains)]
        held = {name: delta.copy() for name, delta in self.oracle.delta().items()}
        updates, dense_sent, self.changes, self.ranks = [], {}, {}, []
        for k, client in enumerate(present):
            rank = self.pruned.get(client.name, client.rank)
            sent = train(strategy, before, client, fresh, [number, k])
            pairs = train_oracle(self.oracle, client, rank, trains, fresh, [number, k])
            began = self.oracle.sent(rank) or {n: (0 * a, 0 * b) for n, (a, b) in pairs.items()}
            frozen = strategy.local_rule(before, client.name).freezes_tail and before.start
            began_rank = before.start.rank if frozen and before.start else rank
            share = strategy.local_rule(before, client.name).prune
            if share < 1.0 and (number + k) % 2:
                rank = self.pruned[client.name] = nearest(PRUNE * rank)
                sent = truncate(sent, rank)
                pairs = {name: (a[:rank], b[:, :rank]) for name, (a, b) in pairs.items()}
            dense_sent[client.name] = pairs
            self.changes[client.name] = add(products(pairs), products(began), -1.0)
            self.ranks.append(began_rank)
            whole = with_tail(strategy, before, client, sent)
            updates.append(Update(client.name, shares[client.name], whole))
        self.before, self.updates, self.shares = before, updates, shares
        self.model = strategy.aggregate(before, Cohort(updates)).model
        self.oracle.round(dense_sent, shares)
        self.moved = add(self.oracle.delta(), held, -1.0)


def nearest(number: float) -> int:
    """The nearest whole number, halves to the even one; PRUNE times a rank has no rounding."""
    return int(Decimal(number).quantize(Decimal(1), ROUND_HALF_EVEN))


def shares_of(present: Sequence[Client]) -> Mapping[str, float]:
    examples = sum(client.examples for client in present)
    return {client.name: client.examples / examples for client in present}
