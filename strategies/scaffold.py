"""SCAFFOLD: FedAvg of the factors, whose clients correct their drift by control variates.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning", ICML 2020, arXiv 1910.06378; here on LoRA factors.

    client k steps along   g - c_k + c,   then   c_k' <- the mean of its gradients g in the round
    A <- sum_k p_k A_k,   B <- sum_k p_k s_k B_k   (scale 1)
    c <- c + 1/N sum_k (c_k' - c_k),   N the clients of the run

The paper's second rule, c_k' = c_k - c + (theta_start - theta_k) / (K eta), is this mean wherever a
step is eta times the corrected gradient. Clients here step by AdamW, for which it would be another
number, so the mean itself is taken; and since AdamW divides by the size of the gradient, it is the
direction of steps that is corrected. c travels down and c_k' - c_k up, in float32: twice the bytes
of FedAvg. A client keeps c_k; one that lost it begins again from zero, of which c does not know.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter
from adapters.algebra import mean_of_factors
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean
from wire.rules import CONTROL, LocalRule


@dataclass(frozen=True)
class Scaffold(Strategy):
    """start <- (mean of A, mean of s B);  c <- c + mean over all clients of what c_k changed."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; not exact."""
        return Properties(
            title="SCAFFOLD",
            source="ICML 2020, arXiv 1910.06378",
            mixed_ranks=False,
            exact=False,
            reveals="the means of the factors and of the gradients; with two clients, each other's",
            sums_only=True,
            bytes_up="2 b r D",
            bytes_down="2 b r D",
            averages=True,
            weighs_anew="its control variates count every client alike, so that one client turns "
            "the steps of all others, whatever the robust rule made of its weight",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client; c is zero."""
        return GlobalModel(start=fresh)

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """Gradients are corrected."""
        return LocalRule(control=True)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The weighted mean of each factor, and the server's control variate."""
        changes = [update.control for update in cohort.updates if update.control is not None]
        before = model.state.get(CONTROL)
        known = [before] if isinstance(before, Adapter) else []
        share = 1.0 / max(cohort.population, len(cohort.updates))
        state = dict(model.state)
        if changes or known:
            weights = [*(1.0 for _ in known), *(share for _ in changes)]
            state[CONTROL] = mean_of_factors([*known, *changes], weights)
        return Aggregated(GlobalModel(model.merged, mean(cohort.updates), state=state))
