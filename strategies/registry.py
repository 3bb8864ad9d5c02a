"""The methods by name, and the one place where a name becomes a Strategy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.errors import UsageError, listing, nearest
from strategies.fedavg import FedAvg
from strategies.fedex_lora import FedExLora
from strategies.fedsa_lora import FedSaLora
from strategies.ffa_lora import FfaLora
from strategies.flexlora import FlexLora
from strategies.flora import Flora
from strategies.flora_na import FloraNa
from strategies.florist import Florist
from strategies.frlora import FrLora
from strategies.hetlora import HetLora
from strategies.ideal import Ideal
from strategies.lora_fair import LoraFair
from strategies.rbla import Rbla
from strategies.rolora import RoLora
from strategies.strategy import Strategy
from strategies.warm_start import RANDOM, check_policy
from strategies.zero_padding import ZeroPadding

AUTO = "auto"
ROBUST = "geometric-median"


@dataclass(frozen=True)
class Options:
    """What a run may choose about its method; each method takes what concerns it."""

    energy: float = 0.0
    """0: the method's own."""
    policy: str = AUTO
    ridge: float = LoraFair.ridge
    prune: float = HetLora.prune
    penalty: float = HetLora.penalty
    min_rank: int = HetLora.min_rank

    def energy_or(self, default: float) -> float:
        """The energy, or the method's own where none was chosen."""
        return self.energy or default

    def policy_or(self, default: str) -> str:
        """The start policy, or the method's own where none was chosen."""
        return check_policy(default if self.policy == AUTO else self.policy)


STRATEGIES: Mapping[str, Callable[[Options], Strategy]] = {
    "flora": lambda o: Flora(o.energy_or(Flora.energy), o.policy_or(RANDOM)),
    "flora-warm": lambda o: Flora(o.energy_or(Flora.energy), o.policy_or("global")),
    "fedavg": lambda o: FedAvg(),
    "zero-padding": lambda o: ZeroPadding(),
    "hetlora": lambda o: HetLora(o.prune, o.penalty, o.min_rank),
    "flexlora": lambda o: FlexLora(),
    "ffa-lora": lambda o: FfaLora(),
    "rolora": lambda o: RoLora(),
    "fedex-lora": lambda o: FedExLora(),
    "lora-fair": lambda o: LoraFair(o.ridge),
    "fedsa-lora": lambda o: FedSaLora(),
    "florist": lambda o: Florist(o.energy_or(Florist.energy), o.policy_or(RANDOM)),
    "frlora": lambda o: FrLora(),
    "rbla": lambda o: Rbla(),
    "flora-na": lambda o: FloraNa(),
    "ideal": lambda o: Ideal(),
}
HAVE_A_START_POLICY = ("flora", "flora-warm", "florist")


def make_strategy(name: str, options: Options | None = None) -> Strategy:
    """The strategy of this name; UsageError lists the names there are.

    >>> make_strategy("fedavg").properties.mixed_ranks
    False
    """
    if name not in STRATEGIES:
        near = nearest(name, STRATEGIES)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UsageError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}{hint}")
    options = options or Options()
    if options.policy != AUTO and name not in HAVE_A_START_POLICY:
        raise UsageError(
            f"start.policy={options.policy} is for {', '.join(HAVE_A_START_POLICY)}; {name} "
            "says itself what a round begins from: leave start.policy at auto"
        )
    return STRATEGIES[name](options)


def refuse_weights(name: str, strategy: Strategy, weights: str) -> None:
    """UsageError, before any training, where the strategy would undo robust weights.

    weights: clients.weights.
    """
    undone = strategy.properties.weighs_anew
    if weights != ROBUST or not undone:
        return
    others = [other for other in STRATEGIES if not make_strategy(other).properties.weighs_anew]
    raise UsageError(
        f"clients.weights={ROBUST} protects nothing under {name}: {undone}. Take "
        "clients.weights=examples or uniform (clients.clip-norm-ratio bounds single clients), or "
        f"another strategy: {', '.join(others)}"
    )


def why_one_rank(name: str, strategy: Strategy) -> str:
    """Why all clients of this strategy need the same rank; empty where they do not."""
    if strategy.properties.mixed_ranks:
        return ""
    others = [other for other in STRATEGIES if make_strategy(other).properties.mixed_ranks]
    return (
        f"{name} averages the factors entry by entry and needs one rank for all clients "
        f"(strategies for mixed ranks: {', '.join(others)})"
    )


def refuse_ranks(name: str, strategy: Strategy, ranks: Mapping[str, int]) -> None:
    """UsageError, before any training, where these clients' ranks do not fit the strategy.

    ranks: client -> the rank it trains.
    """
    if strategy.properties.mixed_ranks or len(set(ranks.values())) <= 1:
        return
    by_rank: dict[int, list[str]] = {}
    for client, rank in ranks.items():
        by_rank.setdefault(rank, []).append(client)
    groups = [f"rank {rank}: {listing(by_rank[rank])}" for rank in sorted(by_rank, reverse=True)]
    others = [other for other in STRATEGIES if make_strategy(other).properties.mixed_ranks]
    raise UsageError(
        f"{name} averages the factors entry by entry and needs one rank for all clients, but they "
        f"train {len(by_rank)} different ranks ({'; '.join(groups)}). Give every client the same "
        f"rank (--ranks {min(by_rank)}), or take a strategy for mixed ranks: {', '.join(others)}."
    )
