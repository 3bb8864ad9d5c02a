"""FRLoRA: every round trains the leading directions of the base; what it moves goes into the base.

Yan et al.: "Federated Residual Low-Rank Adaption of Large Language Models", ICLR 2025.

    W_l = U S V',   B_0 = U sqrt(S)[:, :r],  A_0 = sqrt(S) V'[:r]   (scale 1), once, by module
    A' = sum_k p_k A_k,   B' = sum_k p_k s_k B_k
    merged <- merged + B' A' - B_0 A_0,   start <- (A_0, B_0)

Before round one merged is -B_0 A_0, so that the global model is the base. Every client has the same
base, so any client can decompose it; the server, which has no base weights, asks one of them.
A client writes both at its own scale s, where they are U sqrt(S / s) and sqrt(S / s) V', as in the
authors' code; there all clients weigh alike (clients.weights=uniform).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import stack
from adapters.refactoring import refactor
from strategies.strategy import GlobalModel, Properties, Strategy, Update, mean


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
            bytes_down="b (r + min(r (T + 1), m, n)) D",
            begins_from_base=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The leading directions of the base, which are taken out of it."""
        return GlobalModel(merged=stack([fresh], [-1.0]), start=fresh)

    def aggregate(self, model: GlobalModel, updates: Sequence[Update]) -> GlobalModel:
        """What the mean of the factors moved goes into merged."""
        assert model.merged is not None
        assert model.start is not None
        moved = stack([mean(updates), model.start], [1.0, -1.0])
        merged = refactor(stack([model.merged, moved], [1.0, 1.0])).adapter
        return GlobalModel(merged, model.start, increment=moved)
