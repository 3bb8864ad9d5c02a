"""What the admitted replies of a round become: a cohort with its weights, and the next model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.algebra import beyond
from adapters.head import mean_of_heads
from server.admission import Reply
from server.broadcast import Asked, Broadcast, received_start
from server.changes import Changes
from server.guard import geometric_median_weights, keeps_b, step_of_a
from strategies.strategy import Aggregated, Cohort, GlobalModel, Strategy, Update


@dataclass(frozen=True, eq=False)
class Combined:
    """One round, combined."""

    before: GlobalModel
    replies: Sequence[Reply]
    cohort: Cohort
    """An update for each reply, in the same order."""
    changes: Changes
    """What each client changed of the start that it received."""
    freezes_tail: bool
    """What lies beyond a client's rank in the start is part of its model."""
    aggregated: Aggregated
    """The next model, with the mean of the heads where the task has one."""


def combine(
    strategy: Strategy,
    before: GlobalModel,
    replies: Sequence[Reply],
    asked: Sequence[Asked],
    sent: Broadcast,
    weights: str,
    population: int = 0,
) -> Combined:
    """Weigh the replies of those who were asked and sent this, and aggregate them.

    weights: clients.weights.  population: clients of the run; 0: those who replied.
    """
    changes = changes_of(replies, received_start(before, sent), keeps_b(asked))
    updates = weigh(replies, weights, changes)
    freezes_tail = any(each.rule.freezes_tail for each in asked)  # a cohort does so as one
    cohort = Cohort(
        updates, frozen_tails(updates, before.start) if freezes_tail else None, population
    )
    made = strategy.aggregate(before, cohort)
    heads = [reply.head for reply in replies if reply.head is not None]
    if heads:
        head = mean_of_heads(heads, [update.weight for update in updates])
        made = replace(made, model=replace(made.model, head=head))
    return Combined(before, replies, cohort, changes, freezes_tail, made)


def changes_of(replies: Sequence[Reply], began: Adapter | None, own_b: bool = False) -> Changes:
    """What these clients changed of the start that they received.

    own_b: B never travels, so that a change is that of A.
    """
    trained, ranks = [reply.adapter for reply in replies], [reply.asked.rank for reply in replies]
    if own_b:
        return Changes([step_of_a(adapter, began) for adapter in trained], None, ranks)
    return Changes(trained, began, ranks)


def weigh(replies: Sequence[Reply], rule: str, changes: Changes) -> list[Update]:
    """Updates with weights p_k that sum to 1.

    n_k / sum n under `examples`, 1 / K under `uniform`, and under `geometric-median` those whose
    mean is the geometric median of the changes, each counted with n_k / sum n.
    """
    counts = [1 if rule == "uniform" else reply.metrics.num_examples for reply in replies]
    shares = [count / sum(counts) for count in counts]
    if rule == "geometric-median":
        shares = geometric_median_weights(changes.products(), shares)
    return [
        Update(reply.client, share, reply.adapter, reply.control)
        for reply, share in zip(replies, shares, strict=True)
    ]


def frozen_tails(updates: Sequence[Update], start: Adapter | None) -> Adapter | None:
    """What the clients kept frozen of `start`, all together: sum_k p_k beyond(start, r_k).

    None where nobody froze anything. Direction j of the start is in it with the weights of those
    clients whose rank is at most j.
    """
    ranks = [update.adapter.rank for update in updates]
    if start is None or start.rank <= min(ranks):
        return None
    modules = {}
    for name, f in beyond(start, min(ranks)).items():
        places = np.arange(min(ranks), min(ranks) + f.rank)
        kept = sum(
            update.weight * (places >= rank) for update, rank in zip(updates, ranks, strict=True)
        )
        modules[name] = Factors(f.a, f.b * np.asarray(kept, np.float32), f.scale)
    return Adapter(modules)
