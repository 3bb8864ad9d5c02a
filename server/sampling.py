"""Who takes part in a round, and with which seed: functions of (seed, round, client) alone."""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Member = TypeVar("Member")


def derive_seed(*parts: int | str) -> int:
    """A seed of 62 bits from run seed, round, client and the like; the same on every machine.

    >>> derive_seed(7, 1, "client-03") == derive_seed(7, 1, "client-03")
    True
    >>> derive_seed(7, 1, "client-03") == derive_seed(7, 2, "client-03")
    False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def sample_cohort(
    roster: Sequence[Member], fraction: float, seed: int, server_round: int
) -> list[Member]:
    """ceil(fraction * clients) of the roster without replacement, in roster order, at least one.

    >>> sample_cohort(list("abcd"), 1.0, seed=0, server_round=1)
    ['a', 'b', 'c', 'd']
    >>> len(sample_cohort(list("abcd"), 0.3, seed=0, server_round=1))
    2
    """
    size = max(1, math.ceil(fraction * len(roster) - 1e-9))
    rng = np.random.default_rng(derive_seed(seed, server_round, "cohort"))
    chosen = rng.choice(len(roster), size=size, replace=False)
    return [roster[int(index)] for index in sorted(chosen)]
