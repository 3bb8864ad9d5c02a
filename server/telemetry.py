"""One line of rounds.jsonl: what a round did, in numbers that a person can check.

Names end in their unit (`_bytes`, `_seconds`). All norms are Frobenius norms. The change D_k of a
client is its trained delta less the delta that it began from; noise is relative to the round's
ideal change sum_k p_k D_k. What the server cannot know, such as the change of a client that keeps
its B, is null.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.adapter import Adapter
from adapters.algebra import beyond, module_norms, total_norm
from journal.record import ClientRecord, FailureRecord, Present, RoundRecord
from server.admission import Rejection, Reply
from server.broadcast import Asked, Broadcast, broadcast_error
from server.changes import Changes, compared, cosines
from server.combining import Combined
from server.guard import keeps_b
from server.roster import Roster
from strategies.noise import Compared, compare, ideal_change
from strategies.strategy import Cohort, GlobalModel


def round_record(
    server_round: int,
    combined: Combined,
    after: GlobalModel,
    asked: Sequence[Asked],
    sent: Broadcast,
    rejected: Sequence[Rejection],
    seed: int = 0,
) -> RoundRecord:
    """Losses, bytes, noise and ranks of a round, and each client's share in it.

    after: the next model as it is saved.
    asked: all who were sent the model, whether they answered or not.
    seed: chooses the clients whose changes are compared with each other, where there are many.
    """
    before, replies, cohort = combined.before, combined.replies, combined.cohort
    changes = combined.changes
    known = not keeps_b(asked)
    found = None
    if known:
        found = compare(before, after, ideal_change(cohort, changes.began, changes.ranks))
    norms = changes.norms().tolist() if known else [None] * len(replies)
    missed = _missed(after.start, replies, combined.freezes_tail, found)
    tokens = sum(reply.metrics.tokens for reply in replies)
    loss = sum(reply.metrics.loss * reply.metrics.tokens for reply in replies)
    return {
        "round": server_round,
        "train_loss": loss / tokens if tokens else 0.0,
        "train_tokens": tokens,
        "aggregation_noise": found.noise if found else None,
        "noise_relative_to_model": found.relative_to_model if found else None,
        "ideal_change_norm": found.size if found else None,
        "mean_change_norm": sum(norms) / len(norms) if known else None,
        "effective_rank": found.effective_rank if found else None,
        "global_rank": _rank(after),
        "bytes_up": sum(reply.bytes_up for reply in replies),
        "bytes_down": sum(sent.bytes_for(each.member) for each in asked),
        "broadcast_error": broadcast_error(before, sent),
        "version": sent.version,
        "clients": [
            {
                "client": reply.client,
                "rank": reply.adapter.rank,
                "weight": update.weight,
                "num_examples": reply.metrics.num_examples,
                "loss": reply.metrics.loss,
                "tokens": reply.metrics.tokens,
                "steps": reply.metrics.steps,
                **_seen(reply),
                "change_norm": norms[k],
                "distribution_noise": missed[reply.adapter.rank][0],
                "bytes_up": reply.bytes_up,
                "bytes_down": sent.bytes_for(reply.asked.member),
                "wire_error": reply.metrics.wire_error,
                "train_seconds": reply.metrics.seconds,
                "peak_bytes": reply.metrics.peak_bytes,
            }
            for k, (reply, update) in enumerate(zip(replies, cohort.updates, strict=True))
        ],
        "failures": failures_of(rejected),
        **(_similarity(changes, [reply.client for reply in replies], seed) if known else {}),
        "module_noise": found.modules if found else None,
        "module_distribution_noise": _mean_of_modules(cohort, missed) if found else None,
    }


def failures_of(rejected: Sequence[Rejection]) -> list[FailureRecord]:
    """Rejections as they are recorded."""
    return [{"client": each.client, "reason": each.reason} for each in rejected]


def _seen(reply: Reply) -> ClientRecord:
    """Examples trained on, where the client counted them; an earlier Bouquet's did not."""
    seen = reply.metrics.examples_seen
    return {} if seen is None else {"examples_seen": seen}


def _similarity(changes: Changes, names: Sequence[str], seed: int) -> RoundRecord:
    """The cosines between any two clients' changes; of many clients, between those of a sample."""
    chosen = compared(len(names), seed)
    if chosen is None:
        return {"cosine": np.round(cosines(changes.products()), 4).tolist()}
    return {
        "cosine": np.round(cosines(changes.of(chosen).products()), 4).tolist(),
        "cosine_sampled": [names[k] for k in chosen],
    }


Missed = Mapping[int, tuple[float | None, Mapping[str, float | None]]]
"""Rank -> distribution noise of a client of it, in total and by module."""


def _missed(
    start: Adapter | None, replies: Sequence[Reply], freezes_tail: bool, found: Compared | None
) -> Missed:
    """freezes_tail: clients keep what lies beyond their rank in the start, and miss nothing."""
    missed: dict[int, tuple[float | None, Mapping[str, float | None]]] = {}
    for rank in {reply.adapter.rank for reply in replies}:
        if found is None:
            missed[rank] = None, {}
            continue
        norms = {} if freezes_tail else missed_norms(start, rank)
        missed[rank] = (
            _share(total_norm(norms), found.size),
            {name: _share(norms.get(name, 0.0), size) for name, size in found.sizes.items()},
        )
    return missed


def _mean_of_modules(cohort: Cohort, missed: Missed) -> dict[str, float | None]:
    """Module -> distribution noise, the mean over clients by weight."""
    weights: dict[int, float] = {}
    for update in cohort.updates:
        rank = update.adapter.rank
        weights[rank] = weights.get(rank, 0.0) + update.weight
    means: dict[str, float | None] = {}
    for name in cohort.updates[0].adapter:
        shares = [(weight, missed[rank][1][name]) for rank, weight in weights.items()]
        known = [weight * share for weight, share in shares if share is not None]
        means[name] = sum(known) if len(known) == len(shares) else None
    return means


def missed_norms(start: Adapter | None, rank: int) -> dict[str, float]:
    """Module -> ||delta(start) - delta(start cut to `rank`)||: what a client of it never sees."""
    if start is None or start.rank <= rank:
        return {}
    return module_norms([(1.0, beyond(start, rank))])


def _share(part: float, whole: float) -> float | None:
    """None where something is missed of a round that changed nothing."""
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 else None


def _rank(model: GlobalModel) -> int:
    """The largest rank that merged and start can have together in any module."""
    parts = [part for part in (model.merged, model.start) if part is not None]
    return (
        max(
            (min(sum(p[name].rank for p in parts), *parts[0][name].shape) for name in parts[0]),
            default=0,
        )
        if parts
        else 0
    )


def base_record(held_out: RoundRecord, roster: Roster) -> RoundRecord:
    """The line of round 0: the base model before any training, and who was there to begin with.

    The largest rank among them is that of the run's first factors.
    """
    present: list[Present] = [
        {"client": m.name, "rank": m.rank, "num_examples": m.num_examples} for m in roster.members
    ]
    return {"round": 0, **held_out, "base": roster.base, "present": present}
