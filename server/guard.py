"""What the changes of a whole cohort say about one reply: too large, clipped, or an outlier.

A change is the trained delta less that of the start, as far as the client's rank let it see it.
Norms and inner products come from Gram matrices of the factors; no dense delta is formed. Where B
is the client's own and never travels, nobody but the client knows its delta: what is measured then
is the factor that travelled, A - A_0.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from adapters.adapter import Adapter, Factors
from adapters.algebra import inner, module_norms, norm, pad, rescale, total_norm, truncate
from server.admission import Admitted, Rejection
from server.broadcast import Asked
from server.changes import Changes
from settings.federation import ClientsSettings
from strategies.noise import ROUNDING

SMALLEST_COHORT = 3
"""Of two replies nobody can say which is out of line."""
ITERATIONS = 2000
SETTLED = 1e-12
NEAREST = 1e-9
"""Distances in the geometric median are at least this share of the largest."""


def guard(
    admitted: Admitted, cohort: Sequence[Asked], start: Adapter | None, clients: ClientsSettings
) -> Admitted:
    """The replies without those whose change is absurdly large, and the rest clipped, as asked.

    With m the median of ||change_k||_F over at least three replies: excluded above
    `max_norm_ratio` m, scaled down to `clip_norm_ratio` m above that. 0 turns either off. Where the
    cohort keeps B, change_k is that of A.
    """
    replies = admitted.replies
    if len(replies) < SMALLEST_COHORT or not (clients.max_norm_ratio or clients.clip_norm_ratio):
        return admitted
    own_b = keeps_b(cohort)
    ranks = [reply.asked.rank for reply in replies]
    norms = (
        [step_norm(reply.adapter, start) for reply in replies]
        if own_b
        else Changes([reply.adapter for reply in replies], start, ranks).norms().tolist()
    )
    median = float(np.median(norms))
    kept, rejected = [], list(admitted.rejected)
    for reply, size in zip(replies, norms, strict=True):
        if clients.max_norm_ratio and size > clients.max_norm_ratio * median > 0.0:
            reason = (
                f"its change has norm {size:.3g}, {size / median:.3g} times the median of the "
                f"round; clients.max-norm-ratio is {clients.max_norm_ratio:g}"
            )
            rejected.append(Rejection(reply.client, reason))
        elif clients.clip_norm_ratio and size > clients.clip_norm_ratio * median > 0.0:
            limit = clients.clip_norm_ratio * median
            clip = clip_step if own_b else clip_change
            kept.append(replace(reply, adapter=clip(reply.adapter, start, limit)))
        else:
            kept.append(reply)
    order = [asked.member.name for asked in cohort]
    rejected.sort(key=lambda rejection: order.index(rejection.client))
    return replace(admitted, replies=kept, rejected=rejected)


def keeps_b(cohort: Sequence[Asked]) -> bool:
    """Whether this cohort's B never travels, so that its deltas are unknown; it does so as one."""
    return any(each.rule.keeps_b for each in cohort)


def step_of_a(adapter: Adapter, start: Adapter | None) -> Adapter:
    """A - A_0 as an adapter: its delta has the norms and inner products of that step.

    B is the first r columns of the unit matrix, so that B (A - A_0) is A - A_0, below it zeros.
    A_0 is zero where there is no start.
    """
    begin = _begin(adapter, start)
    modules = {}
    for name, f in adapter.items():
        at = np.zeros_like(f.a) if start is None else begin[name].a
        rows = f.rank if start is None else max(f.rank, start[name].rank)
        modules[name] = Factors(f.a - at, np.eye(rows, f.rank, dtype=np.float32), 1.0)
    return Adapter(modules)


def step_norm(adapter: Adapter, start: Adapter | None) -> float:
    """||A - A_0||_F over all modules; 0 where it is rounding."""
    size = norm(step_of_a(adapter, start))
    whole = float(np.sqrt(sum(float(np.vdot(f.a, f.a)) for f in adapter.values())))
    return size if size > ROUNDING * whole else 0.0


def clip_step(adapter: Adapter, start: Adapter | None, limit: float) -> Adapter:
    """The adapter with A drawn back to A_0 + t (A - A_0), t = limit / ||A - A_0||; B stays."""
    step = step_of_a(adapter, start)
    back = np.float32(1.0 - min(1.0, limit / norm(step)))
    return Adapter({n: Factors(f.a - back * step[n].a, f.b, f.scale) for n, f in adapter.items()})


def change_norm(adapter: Adapter, start: Adapter | None) -> float:
    """||s B A - delta(start cut to this rank)||_F over all modules; 0 where it is rounding."""
    whole = norm(adapter)
    if start is None:
        return whole
    size = total_norm(module_norms([(1.0, adapter), (-1.0, truncate(start, adapter.rank))]))
    return size if size > ROUNDING * whole else 0.0


def clip_change(adapter: Adapter, start: Adapter | None, limit: float) -> Adapter:
    """The adapter drawn back towards its start until its change has norm `limit`.

    Along A(t) = A_0 + t (A - A_0), B(t) = B_0 + t (B - B_0), at one scale s,

        change(t) = t X + t^2 Y,   X = s (B_0 dA + dB A_0),   Y = s dB dA
        ||change(t)||^2 = t^2 <X, X> + 2 t^3 <X, Y> + t^4 <Y, Y>,

    and t is the first root of that at limit^2: exact, from r x r Gram matrices, and the rank stays.
    Without a start A_0 = A and B_0 = 0, so that B is scaled by limit / ||change||.

    >>> x = Adapter({"q": Factors(np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 1.0)})
    >>> round(change_norm(x, None), 6), round(change_norm(clip_change(x, None, 1.0), None), 6)
    (4.0, 1.0)
    """
    begin = _begin(adapter, start)
    linear, quadratic = {}, {}
    for name, f in adapter.items():
        at = begin[name]
        d_a, d_b = f.a - at.a, f.b - at.b
        linear[name] = Factors(
            np.concatenate([d_a, at.a]), np.concatenate([at.b, d_b], axis=1), f.scale
        )
        quadratic[name] = Factors(d_a, d_b, f.scale)
    x, y = Adapter(linear), Adapter(quadratic)
    roots = np.roots([inner(y, y), 2.0 * inner(x, y), inner(x, x), 0.0, -(limit**2)])
    real = roots.real[np.abs(roots.imag) <= 1e-9 * np.abs(roots)]
    t = np.float32(min((root for root in real if 0.0 < root <= 1.0), default=1.0))
    modules = {}
    for name, f in adapter.items():
        at = begin[name]
        modules[name] = Factors(at.a + t * (f.a - at.a), at.b + t * (f.b - at.b), f.scale)
    return Adapter(modules)


def _begin(adapter: Adapter, start: Adapter | None) -> Adapter:
    """What this adapter began from, at its own ranks and scales."""
    modules = {}
    for name, f in adapter.items():
        if start is None:
            modules[name] = Factors(f.a, np.zeros_like(f.b), f.scale)
        else:
            seen = rescale(truncate(Adapter({name: start[name]}), f.rank), f.scale)
            modules[name] = pad(seen, f.rank)[name]
    return Adapter(modules)


def geometric_median_weights(
    products: npt.NDArray[np.float64], shares: Sequence[float]
) -> list[float]:
    """Weights w with sum 1 whose mean z = sum_k w_k x_k minimises sum_k p_k ||z - x_k||.

    products: [j, k] = <x_j, x_k>.  shares: p_k > 0, with sum 1.

    Weiszfeld's iteration w_k ~ p_k / ||z - x_k|| on the K x K matrix of inner products, begun at
    w = p. As long as the clients that lie hold less than half of the shares, they cannot move z
    further than the others are apart, however large their changes are; the price is that z is not
    the mean of honest clients whose data differ. Pillutla, Kakade, Harchaoui: "Robust Aggregation
    for Federated Learning", IEEE TSP 2022, arXiv 1912.13445.

    >>> line = np.array([0.0, 1.0, 1000.0])
    >>> weights = geometric_median_weights(np.outer(line, line), [1 / 3, 1 / 3, 1 / 3])
    >>> round(float(line @ weights), 3)
    1.0
    """
    p = np.asarray(shares, np.float64)
    w = p / p.sum()
    for _ in range(ITERATIONS):
        across = products @ w
        squares = np.diag(products) - 2.0 * across + w @ across
        distances = np.sqrt(np.maximum(squares, 0.0))
        largest = distances.max()
        if largest == 0.0:
            break
        pull = p / np.maximum(distances, NEAREST * largest)
        before, w = w, pull / pull.sum()
        if np.abs(w - before).max() < SETTLED:
            break
    return [float(weight) for weight in w]
