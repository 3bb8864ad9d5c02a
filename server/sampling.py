"""Who takes part in a round, and with which seed: functions of (seed, round, client) alone."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from settings.seeds import derive_seed

Member = TypeVar("Member")


def cohort_size(clients: int, fraction: float) -> int:
    """How many of them a round needs: ceil(fraction * clients), at least one.

    >>> cohort_size(4, 0.3), cohort_size(10, 0.3), cohort_size(3, 0.01)
    (2, 3, 1)
    """
    return max(1, math.ceil(fraction * clients - 1e-9))


def sample_cohort(
    roster: Sequence[Member],
    fraction: float,
    seed: int,
    server_round: int,
    over_selection: float = 1.0,
) -> list[Member]:
    """Whom a round asks: as many as it needs times `over_selection`, in roster order.

    Drawn without replacement; never more than there are.

    >>> sample_cohort(list("abcd"), 1.0, seed=0, server_round=1)
    ['a', 'b', 'c', 'd']
    >>> len(sample_cohort(list("abcd"), 0.5, seed=0, server_round=1, over_selection=1.3))
    3
    """
    needed = cohort_size(len(roster), fraction)
    size = min(len(roster), math.ceil(over_selection * needed - 1e-9))
    rng = np.random.default_rng(derive_seed(seed, server_round, "cohort"))
    chosen = rng.choice(len(roster), size=size, replace=False)
    return [roster[int(index)] for index in sorted(chosen)]
