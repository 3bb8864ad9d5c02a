"""RoLoRA: B trains in one round and A in the next, so that each average is exact.

Chen et al.: "Robust Federated Finetuning of LLMs via Alternating
Optimization of LoRA", NeurIPS 2025, arXiv 2502.01755.

    odd rounds    B <- sum_k p_k s_k B_k,   A as it was
    even rounds   A <- sum_k p_k A_k,       B as it was   (scale 1)

The factor that rests is the same for all, so the mean of the other is that of the deltas. Only the
trained factor travels up. Both travel down, so that a client that joins late or missed a round is
right all the same; one that was there in the last round would need only the factor that changed.
"""

from dataclasses import dataclass

from adapters.adapter import Adapter, Factors
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, mean
from wire.rules import A, B, LocalRule

OTHER = {A: B, B: A}


@dataclass(frozen=True)
class RoLora(Strategy):
    """start <- the mean of the factor whose turn it is, and the other as it was."""

    @property
    def properties(self) -> Properties:
        """Needs equal ranks; exact, because one factor is the same everywhere."""
        return Properties(
            title="RoLoRA",
            source="NeurIPS 2025, arXiv 2502.01755",
            mixed_ranks=False,
            exact=True,
            reveals="the mean of the factor in turn; with two clients, each other's",
            sums_only=True,
            bytes_up="b r M, then b r N",
            bytes_down="b r D",
            averages=True,
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """B is zero and has the first turn."""
        return GlobalModel(start=fresh, state={"turn": "B"})

    def local_rule(self, model: GlobalModel, client: str) -> LocalRule:
        """The factor whose turn it is trains and travels."""
        turn = A if model.state["turn"] == A else B
        return LocalRule(trains=turn, sends=turn)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """The mean of the factor in turn; then it is the other's turn."""
        assert model.start is not None
        turn, average = str(model.state["turn"]), mean(cohort.updates)
        modules = {}
        for name, old in model.start.items():
            if turn == "A":
                modules[name] = Factors(average[name].a, old.b, old.scale)
            else:
                modules[name] = Factors(old.a, average[name].b, 1.0)
        after = GlobalModel(model.merged, Adapter(modules), state={"turn": OTHER[turn]})
        return Aggregated(after)
