"""raFLoRA: each level of ranks is averaged over those who have it, then cut as in FlexLoRA.

"raFLoRA", arXiv 2602.13486. Its abstract was to be had, and no code: the levels and their weights
are inferred from it.

    levels h: the directions from one rank of the cohort to the next
    X = sum_h sum_{k: r_k >= h} p_k / (sum_{j: r_j >= h} p_j) s_k B_k[:, h] A_k[h]
    X = U S V',   B <- (U S)[:, :R],   A <- V'[:R]   (scale 1)

FlexLoRA weighs all of a client alike, so that directions that few clients have shrink from round to
round, which the paper calls rank collapse. At equal ranks the two are the same.
"""

from dataclasses import dataclass, replace

from adapters.adapter import Adapter, Factors
from adapters.algebra import add, with_row_norm
from adapters.refactoring import refactor
from strategies.padding import largest_rank
from strategies.strategy import Aggregated, Cohort, GlobalModel, Properties, Strategy, Update


@dataclass(frozen=True)
class RaFlora(Strategy):
    """start <- the first R singular directions of the mean over each level of ranks."""

    @property
    def properties(self) -> Properties:
        """Takes mixed ranks; not exact."""
        return Properties(
            title="raFLoRA",
            source="arXiv 2602.13486",
            mixed_ranks=True,
            exact=False,
            reveals="a mixture of all clients' directions, heaviest those of the largest rank",
            sums_only=False,
            bytes_up="b r_k D",
            bytes_down="b R D",
            forgets_unseen=True,
            weighs_anew="each level of ranks is averaged over those alone that have it, so that "
            "the only client of the largest rank has weight 1 in its last directions",
        )

    def begin(self, fresh: Adapter) -> GlobalModel:
        """The same factors for every client, at the largest rank."""
        return GlobalModel(start=fresh)

    def aggregate(self, model: GlobalModel, cohort: Cohort) -> Aggregated:
        """Level by level, then the best approximation of its rank."""
        updates = cohort.updates
        levels = sorted({update.adapter.rank for update in updates} - {0})
        blocks: list[Update] = []
        for low, high in zip([0, *levels], levels, strict=False):
            having = [update for update in updates if update.adapter.rank >= high]
            whole = sum(update.weight for update in having)
            blocks += [
                replace(u, weight=u.weight / whole, adapter=_between(u.adapter, low, high))
                for u in having
            ]
        if not blocks:
            return Aggregated(GlobalModel(merged=model.merged, start=model.start))
        total = add([block.adapter for block in blocks], [block.weight for block in blocks])
        best = refactor(total, rank=largest_rank(model, updates)).adapter
        return Aggregated(GlobalModel(merged=model.merged, start=with_row_norm(best, 1.0)))


def _between(adapter: Adapter, low: int, high: int) -> Adapter:
    return Adapter(
        {n: Factors(f.a[low:high], f.b[:, low:high], f.scale) for n, f in adapter.items()}
    )
