"""What the admitted replies of a round become: weights, frozen tails, the next global model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.algebra import beyond
from adapters.head import mean_of_heads
from server.admission import Reply
from server.broadcast import Asked
from server.changes import Changes
from server.guard import geometric_median_weights, step_of_a
from strategies.strategy import GlobalModel, Strategy, Update, Updates


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
        Update(reply.client, share, reply.adapter)
        for reply, share in zip(replies, shares, strict=True)
    ]


def freezes_tails(asked: Sequence[Asked]) -> bool:
    """Whether this cohort keeps what lies beyond each client's rank; it does so as one."""
    return any(each.rule.freezes_tail for each in asked)


def frozen_tails(
    replies: Sequence[Reply], updates: Sequence[Update], start: Adapter | None
) -> list[Update]:
    """What the clients kept frozen of `start`, all together: sum_k p_k beyond(start, r_k).

    One more update, of weight 1, or none where nobody froze anything. Direction j of the start is
    in it with the weights of those clients whose rank is at most j.
    """
    ranks = [reply.adapter.rank for reply in replies]
    if start is None or start.rank <= min(ranks):
        return []
    modules = {}
    for name, f in beyond(start, min(ranks)).items():
        places = np.arange(min(ranks), min(ranks) + f.rank)
        kept = sum(
            update.weight * (places >= rank) for update, rank in zip(updates, ranks, strict=True)
        )
        modules[name] = Factors(f.a, f.b * np.asarray(kept, np.float32), f.scale)
    return [Update("frozen", 1.0, Adapter(modules))]


def aggregate(
    strategy: Strategy,
    model: GlobalModel,
    replies: Sequence[Reply],
    updates: Updates,
) -> GlobalModel:
    """The strategy's next model, with the mean of the heads where the task has one.

    updates: those of the replies, in their order, and last what the clients kept frozen.
    """
    after = strategy.aggregate(model, updates)
    heads = [reply.head for reply in replies if reply.head is not None]
    if not heads:
        return after
    weights = [update.weight for update in updates[: len(replies)]]
    return replace(after, head=mean_of_heads(heads, weights))
