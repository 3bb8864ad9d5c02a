"""FRLoRA: every round trains the leading directions of the base; what it moves goes into the base.

Yan et al.: "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025.

    W_l = U S V',   B_0 = U sqrt(S)[:, :r],  A_0 = sqrt(S) V'[:r]   (scale 1), once, by module
    dA = sum_k p_k A_k - A_0,   dB = sum_k p_k s_k B_k - B_0
    merged <- merged + (B_0 + dB)(A_0 + dA) - B_0 A_0,   start <- (A_0, B_0)

Before round one merged is -B_0 A_0, so that the global model is the base. Every client has the same
base, so any client can decompose it; the server, which has no base weights, asks one of them.
A client writes both at its own scale s, where they are U sqrt(S / s) and sqrt(S / s) V', as in the
authors' code; there all clients weigh alike (clients.weights=uniform).

dA and dB are means of changes, in float64, against the start as each client wrote it: a mean of the
factors themselves would be wrong by the same rounding every round, and that adds up in merged. They
are also what a site that holds the start needs of a round: rank r, as in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.adapter import Adapter, Factors, FloatArray
from adapters.algebra import add, rescale, stack
from adapters.refactoring import compact
from adapters.terms import STEP, Term, stepped
from core.errors import AdapterError
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, Update


@dataclass(frozen=True)
class FrLora(Strategy):
    """merged <- merged + (mean of B)(mean of A) - B_0 A_0; start stays (A_0, B_0)."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; not exact."""
        return Properties(
            title="FRLoRA",
            source="ICLR 2025, Yan et al.",
            mixed_ranks=False,
            exact=False,
            reveals="the mean of the factors; with two clients, each other's factors",
            sums_only=True,
            bytes_up="b r D",
            bytes_down="b r D",
            begins_from_base=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The leading directions of the base, which are taken out of it."""
        return GlobalModel(stack([fresh], [-1.0]), start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """What the mean of the factors moved goes into merged."""
        assert model.merged is not None
        assert model.start is not None
        step = mean_step(model.start, cohort.updates)
        if not any(f.a.any() or f.b.any() for f in step.values()):
            return Aggregated(GlobalModel(model.merged, model.start))
        merged = compact(add([model.merged, stepped(model.start, step)], [1.0, 1.0]))
        return Aggregated(GlobalModel(merged, model.start), gained=(Term(STEP, step),))


def mean_step(start: Adapter, updates: Sequence[Update]) -> Adapter:
    """(dA, dB): the weighted mean of what each client's factors moved, at the scale of the start.

    Exactly zero where nobody trained anything. Raises AdapterError where ranks differ.
    """
    modules = {}
    for name, begun in start.items():
        ranks = {begun.rank, *(update.adapter[name].rank for update in updates)}
        if len(ranks) != 1:
            raise AdapterError(
                f"factors average only at one rank; {name} comes with ranks {sorted(ranks)}"
            )
        a, b = np.zeros(begun.a.shape), np.zeros(begun.b.shape)
        for update in updates:
            f = update.adapter[name]
            written = rescale(Adapter({name: begun}), f.scale)[name]
            a += np.float64(update.weight) * (f.a.astype(np.float64) - written.a)
            share = np.float64(update.weight * f.scale / begun.scale)
            b += share * (f.b.astype(np.float64) - written.b)
        modules[name] = Factors(_rounded(a), _rounded(b), begun.scale)
    return Adapter(modules)


def _rounded(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> FloatArray:
    return np.asarray(values, np.float32)
