"""The methods by name, and the one place where a name becomes a Strategy."""

from collections.abc import Callable, Mapping

from adapters.errors import UsageError, listing
from strategies.fedavg import FedAvg
from strategies.flora import Flora
from strategies.strategy import Strategy
from strategies.zero_padding import ZeroPadding

STRATEGIES: Mapping[str, Callable[[float], Strategy]] = {
    "flora": lambda energy: Flora(energy),
    "fedavg": lambda energy: FedAvg(),
    "zero-padding": lambda energy: ZeroPadding(),
}


def make_strategy(name: str, energy: float = 1.0) -> Strategy:
    """The strategy of this name; UsageError lists the names there are.

    >>> make_strategy("fedavg").properties.mixed_ranks
    False
    """
    if name not in STRATEGIES:
        raise UsageError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}")
    return STRATEGIES[name](energy)


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
