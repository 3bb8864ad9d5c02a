"""Every seed of a run derives from its one: functions of (seed, round, client) alone."""

import hashlib

from settings.run import RunSettings


def derive_seed(*parts: int | str) -> int:
    """A seed of 62 bits from run seed, round, client and the like; the same on every machine.

    >>> derive_seed(7, 1, "client-03") == derive_seed(7, 1, "client-03")
    True
    >>> derive_seed(7, 1, "client-03") == derive_seed(7, 2, "client-03")
    False
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def start_seed(settings: RunSettings) -> int:
    """The seed of the factors and the head that every client begins the run with."""
    return derive_seed(settings.seed, "start")
