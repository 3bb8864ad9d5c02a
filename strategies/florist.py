"""FLoRIST: FLoRA whose stack is cut to the singular directions that hold most of its energy.

"FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", arXiv 2506.09199.

    sum_k p_k s_k B_k A_k = U S V',   keep the fewest directions with sum s_i^2 >= energy sum s^2
    merged <- merged + (U S V')_kept,   start <- none: every round begins from fresh factors

The authors take thin decompositions of both stacked factors and one of the small core, as
adapters/refactoring.py does. What earlier rounds found, in merged or in a warm start, is not cut
again, unlike in `flora` with an energy below 1. The paper's thresholds lie between 0.8 and 0.99 by
task; 0.9 here.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import add
from adapters.refactoring import compact
from adapters.terms import PLUS, Term
from settings.keys import key
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy
from strategies.warm_start import RANDOM, Policy, begin_next_round, without_start
from wire.rules import LocalRule


@dataclass(frozen=True)
class Florist(Strategy):
    """merged <- merged + the leading directions of sum_k p_k s_k B_k A_k."""

    energy: float = key(
        "Share of the round's squared norm that each module keeps; 1 is FLoRA.",
        default=0.9,
        above=0,
        at_most=1,
    )
    policy: Policy = key("As start.policy, which sets it.", default=RANDOM)

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; exact only where nothing is cut."""
        return Properties(
            title="FLoRIST" if self.policy == RANDOM else f"FLoRIST, start {self.policy}",
            source="arXiv 2506.09199",
            mixed_ranks=True,
            exact=self.energy == 1.0,
            reveals="a mixture of all clients' directions; with two clients, each other's delta",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b min(r_kept D, m n)"
            if self.policy == RANDOM
            else "b (R D + min(r_kept D, m n))",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The bare base: each client draws its own factors."""
        return GlobalModel(state={"rank": fresh.rank})

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """No client loses a direction of a warm start."""
        return LocalRule(freezes_tail=True)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Stack what the clients moved, cut, and add to what was there before."""
        moved, before = cohort.total, model.total()
        if model.start is not None:
            moved = add([moved, model.start], [1.0, -1.0])
        total = added = compact(moved, self.energy)
        if before is not None:
            total = compact(add([before, added], [1.0, 1.0]))
        after = begin_next_round(self.policy, model, total)
        came_back = () if model.start is None else (Term(PLUS, model.start),)
        return Aggregated(after, (*came_back, *without_start(added, after)))
