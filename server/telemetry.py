"""One line of rounds.jsonl: what a round did, in numbers that a person can check.

Names end in their unit (`_bytes`, `_seconds`). All norms are Frobenius norms of deltas, all noise
is relative to the norm of the round's ideal increment sum_k p_k s_k B_k A_k, and no dense matrix is
formed for any of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.adapter import Adapter
from adapters.algebra import beyond, module_norms, total_norm
from adapters.refactoring import effective_rank, singular_values
from server.broadcast import Asked, Broadcast, broadcast_error
from server.exchange import Rejection, Reply
from server.roster import Roster
from strategies.noise import aggregation_noise
from strategies.strategy import GlobalModel, Update, ideal_increment


def round_record(
    server_round: int,
    before: GlobalModel,
    after: GlobalModel,
    asked: Sequence[Asked],
    sent: Broadcast,
    replies: Sequence[Reply],
    updates: Sequence[Update],
    tails: Sequence[Update],
    rejected: Sequence[Rejection],
    freezes_tail: bool = False,
) -> dict[str, Any]:
    """Losses, bytes, noise and ranks of a round, and each client's share in it.

    asked: all who were sent the model, whether they answered or not.
    tails: what the clients kept frozen of the start that they had.
    freezes_tail: they will keep what lies beyond their rank in the next start, and miss nothing.
    """
    increment = ideal_increment([*updates, *tails])
    sizes = module_norms([(1.0, increment)])
    size = total_norm(sizes)
    noise = aggregation_noise(before, after, increment)
    spectra = singular_values(increment)
    tokens = sum(reply.metrics.get("tokens", 0.0) for reply in replies)
    loss = sum(r.metrics.get("loss", 0.0) * r.metrics.get("tokens", 0.0) for r in replies)
    total = after.total()
    products = inner_products_of_changes([reply.adapter for reply in replies], before.start)
    missed = [
        {} if freezes_tail else missed_norms(after.start, reply.adapter.rank) for reply in replies
    ]
    return {
        "round": server_round,
        "train_loss": loss / tokens if tokens else 0.0,
        "train_tokens": int(tokens),
        "aggregation_noise": noise.total,
        "increment_norm": size,
        "effective_rank": sum(map(effective_rank, spectra.values())) / len(spectra),
        "global_rank": total.rank if total is not None else 0,
        "bytes_up": sum(reply.bytes_up for reply in replies),
        "bytes_down": sum(sent.bytes_for(each.member) for each in asked),
        "broadcast_error": broadcast_error(before, sent),
        "version": sent.version,
        "clients": [
            {
                "client": reply.member.name,
                "rank": reply.adapter.rank,
                "weight": update.weight,
                "num_examples": reply.num_examples,
                "loss": reply.metrics.get("loss"),
                "tokens": int(reply.metrics.get("tokens", 0)),
                "steps": int(reply.metrics.get("steps", 0)),
                "delta_norm": float(np.sqrt(max(products[k, k], 0.0))),
                "distribution_noise": _share(total_norm(missed[k]), size),
                "bytes_up": reply.bytes_up,
                "bytes_down": sent.bytes_for(reply.member),
                "wire_error": reply.metrics.get("wire-error", 0.0),
                "train_seconds": reply.metrics.get("seconds", 0.0),
                "peak_bytes": int(reply.metrics.get("peak-bytes", 0)),
            }
            for k, (reply, update) in enumerate(zip(replies, updates, strict=True))
        ],
        "failures": [{"client": r.client, "reason": r.reason} for r in rejected],
        "cosine": np.round(cosines(products), 4).tolist(),
        "module_noise": noise.modules,
        "module_distribution_noise": {
            name: sum(
                u.weight * _share(m.get(name, 0.0), sizes[name])
                for u, m in zip(updates, missed, strict=True)
            )
            for name in sizes
        },
    }


def missed_norms(start: Adapter | None, rank: int) -> dict[str, float]:
    """Module -> ||delta(start) - delta(start cut to `rank`)||: what a client of it never sees."""
    if start is None or start.rank <= rank:
        return {}
    return module_norms([(1.0, beyond(start, rank))])


def inner_products_of_changes(
    trained: Sequence[Adapter], start: Adapter | None
) -> npt.NDArray[np.float64]:
    """[j, k]: <change_j, change_k> over all modules; a change is the trained delta less that of
    the start, as far as the client's rank lets it see the start.

    From one Gram matrix of all B and one of all A in each module: with E the signs of each
    client's columns, E ((B'B) * (AA')) E'.
    """
    total = np.zeros((len(trained), len(trained)))
    for name in trained[0]:
        factors = [adapter[name] for adapter in trained]
        began = [start[name]] if start is not None else []
        signs = np.zeros((len(trained), sum(f.rank for f in [*factors, *began])))
        at = 0
        for k, f in enumerate(factors):
            signs[k, at : at + f.rank] = f.scale
            at += f.rank
        for f in began:  # its columns come last; a client sees the first of them
            for k, own in enumerate(factors):
                signs[k, at : at + min(own.rank, f.rank)] = -f.scale
        factors += began
        b = np.concatenate([f.b for f in factors], axis=1).astype(np.float64)
        a = np.concatenate([f.a for f in factors], axis=0).astype(np.float64)
        total += signs @ ((b.T @ b) * (a @ a.T)) @ signs.T
    return total


def cosines(products: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Inner products -> cosines; 0 where a norm is 0, and 1 on the diagonal.

    >>> cosines(np.array([[4.0, 2.0], [2.0, 1.0]])).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    norms = np.sqrt(np.maximum(np.diag(products), 0.0))
    size = np.outer(norms, norms)
    found = np.divide(products, size, where=size > 0.0, out=np.zeros_like(products))
    np.fill_diagonal(found, 1.0)
    return np.asarray(np.clip(found, -1.0, 1.0))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def base_record(held_out: Mapping[str, Any], roster: Roster) -> dict[str, Any]:
    """The line of round 0: the base model before any training, and who was there to begin with.

    The largest rank among them is that of the run's first factors.
    """
    present = [
        {"client": m.name, "rank": m.rank, "num_examples": m.num_examples} for m in roster.members
    ]
    return {"round": 0, **held_out, "base": roster.base, "present": present}
