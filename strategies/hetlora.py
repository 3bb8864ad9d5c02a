"""HetLoRA: zero-padding with heavier weights for larger updates, and ranks that clients prune.

Cho, Liu, Xu, Fahrezi, Joshi: "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models", EMNLP 2024, arXiv 2401.06432.

    w_k = p_k ||s_k B_k A_k||_F / sum_j p_j ||s_j B_j A_j||_F
    A <- sum_k w_k pad(A_k),   B <- sum_k w_k pad(s_k B_k)   (scale 1)

A client adds `penalty` ||B_rest||_F ||A_rest||_F to its loss, summed over modules, where `rest` are
the directions from round(prune r_k) on. If that sum is smaller after the round than before, the
client drops them and goes on at rank round(prune r_k), at least `min_rank`.

Choices. The paper's weights are the norms alone; here they multiply p_k, so that
clients.weights=uniform gives the paper's rule. One norm and one rank hold for the whole adapter,
not one for each module. Rounding is that of the FlexLoRA authors' code: at a share of 0.99 ranks up
to 50 have no rest, are not penalised and never fall. A client whose change is large has a large
norm, and so its weight back that a robust rule took: clients.weights=geometric-median is refused.
"""

from dataclasses import dataclass, replace

from adapters.adapter import Adapter
from adapters.algebra import norm
from settings.keys import key
from strategies.padding import pad_updates
from strategies.strategy import (
    Aggregated,
    Cohort,
    GlobalModel,
    Properties,
    Strategy,
    mean,
    whole_number,
)
from wire.rules import LocalRule


@dataclass(frozen=True)
class HetLora(Strategy):
    """start <- FedAvg of the padded factors, weighted by p_k ||delta_k||."""

    prune: float = key(
        "Share of its rank that a client keeps when the penalty has shrunk the rest; 1: no penalty,"
        " no pruning.",
        default=0.99,
        above=0,
        at_most=1,
    )
    penalty: float = key("Weight of the penalty on the last directions.", default=5e-4, at_least=0)
    min_rank: int = key(
        "No client prunes below this rank, or its own where that is lower.", default=4, at_least=1
    )

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; not exact."""
        return Properties(
            title="HetLoRA",
            source="EMNLP 2024, arXiv 2401.06432",
            mixed_ranks=True,
            exact=False,
            reveals="the mean of the factors; above all others' ranks, a client's own rows alone",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b R D",
            averages=True,
            forgets_unseen=True,
            weighs_anew="it multiplies each weight by the norm of the client's delta, so that a "
            "client whose change is large gets back what the robust rule took from it",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client, at the largest rank."""
        return GlobalModel(start=fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """Train at the rank that is left, with the penalty on its last directions."""
        return LocalRule(
            rank=whole_number(model.state, client, 0),
            prune=self.prune,
            min_rank=self.min_rank,
            penalty=self.penalty,
        )

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The mean of the padded factors, and the ranks that the clients came back with."""
        updates = cohort.updates
        sizes = [update.weight * norm(update.adapter) for update in updates]
        if sum(sizes) > 0.0:
            updates = [
                replace(update, weight=size / sum(sizes))
                for update, size in zip(updates, sizes, strict=True)
            ]
        ranks = {update.client: update.adapter.rank for update in updates}
        start = mean(pad_updates(model, updates))
        return Aggregated(GlobalModel(model.merged, start, state={**model.state, **ranks}))
