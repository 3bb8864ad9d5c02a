"""FLoRA: stack the clients' factors, so that the mean of the deltas is exact at any mix of ranks.

Wang, Shen, He, Sun, Wang, Lyu, Li: "FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations", NeurIPS 2024, arXiv 2409.05976.

    B = [p_1 s_1 B_1 | ... | p_K s_K B_K],   A = [A_1 ; ... ; A_K]
    merged <- merged + B A,   start <- none: every round begins from fresh factors

The paper sends the stack itself. Here `merged` and the stack are refactored together into the
lowest rank, or from rank mn/(m+n) on summed as the matrix: the same delta to float32, never more
than m n values a module, and no block that belongs to one client. `energy` below 1 truncates to the
leading singular directions, which saves bytes and gives up exactness. Beginning every round anew is
the paper's rule and its known weakness; `policy` offers others (strategies/warm_start.py), with the
same global model.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import add
from adapters.refactoring import compact
from settings.keys import key
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy
from strategies.warm_start import RANDOM, Policy, begin_next_round, without_start
from wire.rules import LocalRule


@dataclass(frozen=True)
class Flora(Strategy):
    """merged + start <- compact(merged + sum_k p_k s_k B_k A_k)."""

    energy: float = key(
        "Share of ||merged + start||_F^2 that each module keeps; 1 is lossless.",
        default=1.0,
        above=0,
        at_most=1,
    )
    policy: Policy = key("As start.policy, which sets it.", default=RANDOM)

    @property
    def properties(self) -> Properties:
        """Exact at any mix of ranks, unless the energy truncates."""
        return Properties(
            title="FLoRA" if self.policy == RANDOM else f"FLoRA, start {self.policy}",
            source="NeurIPS 2024, arXiv 2409.05976",
            mixed_ranks=True,
            exact=self.energy == 1.0,
            reveals="a mixture of all clients' directions; with two clients, each other's delta",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b min(S D, m n)"
            if self.policy == RANDOM
            else "b (R D + min((R + S) D, m n))",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The bare base: each client draws its own factors."""
        return GlobalModel(state={"rank": fresh.rank})

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """No client loses a direction of a warm start."""
        return LocalRule(freezes_tail=True)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Stack, add to what was merged before, and rewrite in the cheapest form."""
        total = trained = cohort.total
        if model.merged is not None:
            total = add([model.merged, trained], [1.0, 1.0])
        after = begin_next_round(self.policy, model, compact(total, self.energy))
        gained = without_start(trained, after) if self.energy == 1.0 else None
        return Aggregated(after, gained)
