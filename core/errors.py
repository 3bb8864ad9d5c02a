"""The exceptions a person may meet. Every one of them is a sentence that says what to do.

    BouquetError            the run failed                          exit code 1
    ├── UsageError          the command or configuration is wrong   exit code 2
    ├── AdapterError        an adapter is not what it should be     exit code 1
    └── ReplyError          a client's answer is not, either        never leaves the server

The command line prints the message alone; anything that is not a BouquetError is a bug and keeps
its traceback.
"""

import difflib
from collections.abc import Iterable


class BouquetError(Exception):
    """The run cannot go on, for a reason that a person can understand and mend."""

    exit_code = 1


class UsageError(BouquetError):
    """What was asked for cannot be done as it was asked; nothing was started."""

    exit_code = 2


class AdapterError(BouquetError):
    """An adapter whose names, shapes, numbers or bytes are not what they should be."""


class ReplyError(BouquetError):
    """What a client sent is not what it was asked for: it does not count, and the run goes on."""


def listing(items: Iterable[object], limit: int = 5) -> str:
    """Join items for an error message, cut to `limit` of them.

    >>> listing(["q_proj", "v_proj"])
    'q_proj, v_proj'
    >>> listing(range(64))
    '0, 1, 2, 3, 4 (showing 5 of 64)'
    """
    shown = [str(item) for item in items]
    head = ", ".join(shown[:limit])
    return head if len(shown) <= limit else f"{head} (showing {limit} of {len(shown)})"


def nearest(name: str, known: Iterable[str], limit: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names most like this one, the likest first; [] where none is like it.

    limit: at most so many; cutoff: the least similarity, from 0 (any name) to 1 (the same name).

    >>> nearest("flor", ["flora", "fedavg"]), nearest("zzz", ["flora", "fedavg"])
    (['flora'], [])
    """
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=cutoff)


def quoted(text: object, limit: int = 500) -> str:
    r"""What a stranger wrote, cut and without anything that a terminal would obey.

    >>> print(quoted("out of memory\x1b[2J"))
    out of memory\x1b[2J
    """
    shown = str(text)[:limit]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
