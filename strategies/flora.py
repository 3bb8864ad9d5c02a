"""FLoRA: stack the clients' factors, so that the mean of the deltas is exact at any mix of ranks.

Wang, Shen, He, Sun, Wang, Lyu, Li: "FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations", NeurIPS 2024, arXiv 2409.05976.

    B = [p_1 s_1 B_1 | ... | p_K s_K B_K],   A = [A_1 ; ... ; A_K]
    merged <- merged + B A,   start <- none: every round begins from fresh factors

The paper sends the stack itself. Here `merged` and the stack are refactored together into the
lowest rank: the same delta to float32, never more bytes than rank min(m, n) takes, and no block
that belongs to one client. `energy` below 1 truncates to the leading singular directions, which
saves bytes and gives up exactness.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import stack
from adapters.refactoring import refactor
from strategies.strategy import GlobalModel, Properties, Update, ideal_increment


@dataclass(frozen=True)
class Flora:
    """merged <- refactor(merged + sum_k p_k s_k B_k A_k)."""

    energy: float = 1.0
    """Share of ||merged||_F^2 that each module keeps, in (0, 1]; 1.0 is lossless."""

    @property
    def properties(self) -> Properties:
        """Exact at any mix of ranks, unless the energy truncates."""
        return Properties(
            title="FLoRA",
            source="NeurIPS 2024, arXiv 2409.05976",
            mixed_ranks=True,
            exact=self.energy == 1.0,
            reveals="a mixture of all clients' directions; with two clients, each other's delta",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The bare base: each client draws its own factors."""
        return GlobalModel()

    def aggregate(self, model: GlobalModel, updates: Sequence[Update]) -> GlobalModel:
        """Stack, add to what was merged before, and rewrite at the lowest rank."""
        increment = ideal_increment(updates)
        if model.merged is not None:
            increment = stack([model.merged, increment], [1.0, 1.0])
        return GlobalModel(merged=refactor(increment, self.energy).adapter)
