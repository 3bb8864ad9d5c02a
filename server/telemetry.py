"""One line of rounds.jsonl: what a round did, in numbers that a person can check.

Names end in their unit (`_bytes`, `_seconds`). All norms are Frobenius norms of deltas, all noise
is relative to the norm of the round's ideal increment sum_k p_k s_k B_k A_k, and no dense matrix is
formed for any of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.adapter import Adapter
from adapters.algebra import module_norms, norm, total_norm, truncate
from adapters.refactoring import effective_rank, singular_values
from server.exchange import Broadcast, Rejection, Reply
from strategies.strategy import GlobalModel, Update, aggregation_noise, ideal_increment


def round_record(
    server_round: int,
    before: GlobalModel,
    after: GlobalModel,
    sent: Broadcast,
    replies: Sequence[Reply],
    updates: Sequence[Update],
    rejected: Sequence[Rejection],
) -> dict[str, Any]:
    """Losses, bytes, noise and ranks of a round, and each client's share in it."""
    increment = ideal_increment(updates)
    size = norm(increment)
    noise = aggregation_noise(before, after, increment)
    spectra = singular_values(increment)
    tokens = sum(reply.metrics.get("tokens", 0.0) for reply in replies)
    loss = sum(r.metrics.get("loss", 0.0) * r.metrics.get("tokens", 0.0) for r in replies)
    total = after.total()
    return {
        "round": server_round,
        "train_loss": loss / tokens if tokens else 0.0,
        "train_tokens": int(tokens),
        "aggregation_noise": noise.total,
        "increment_norm": size,
        "effective_rank": sum(map(effective_rank, spectra.values())) / len(spectra),
        "global_rank": total.rank if total is not None else 0,
        "bytes_up": sum(reply.bytes_up for reply in replies),
        "bytes_down": sent.num_bytes * (len(replies) + len(rejected)),
        "version": sent.version,
        "clients": [
            {
                "client": reply.member.name,
                "rank": reply.member.rank,
                "weight": update.weight,
                "num_examples": reply.num_examples,
                "loss": reply.metrics.get("loss"),
                "tokens": int(reply.metrics.get("tokens", 0)),
                "steps": int(reply.metrics.get("steps", 0)),
                "distribution_noise": distribution_noise(after, reply.member.rank, size),
                "bytes_up": reply.bytes_up,
                "bytes_down": sent.num_bytes,
                "train_seconds": reply.metrics.get("seconds", 0.0),
                "peak_bytes": int(reply.metrics.get("peak-bytes", 0)),
            }
            for reply, update in zip(replies, updates, strict=True)
        ],
        "failures": [{"client": r.client, "reason": r.reason} for r in rejected],
        "module_noise": noise.modules,
    }


def distribution_noise(model: GlobalModel, rank: int, size: float) -> float:
    """||delta(start) - delta(start cut to `rank`)|| / size: what a client of this rank will miss.

    0 where there is no start, or where size is 0 and nothing is missed.
    """
    if model.start is None or model.start.rank <= rank:
        return 0.0
    cut: Adapter = truncate(model.start, rank)
    missed = total_norm(module_norms([(1.0, model.start), (-1.0, cut)]))
    return missed / size if size > 0.0 else 0.0


def base_record(held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The line of round 0: the base model before any training."""
    return {"round": 0, **held_out}
