"""Mixed ranks made equal by zeros: for methods that average factors entry by entry."""

from collections.abc import Sequence
from dataclasses import replace

from adapters.algebra import pad
from strategies.strategy import GlobalModel, Update


def largest_rank(model: GlobalModel, updates: Sequence[Update]) -> int:
    """The rank of the updates and of the start that they came from: it never falls."""
    ranks = [update.adapter.rank for update in updates]
    return max(ranks) if model.start is None else max(*ranks, model.start.rank)


def pad_updates(model: GlobalModel, updates: Sequence[Update]) -> list[Update]:
    """The same deltas, all at the largest rank."""
    rank = largest_rank(model, updates)
    return [replace(update, adapter=pad(update.adapter, rank)) for update in updates]
