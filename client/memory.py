"""What a client keeps from round to round, where a method asks for it.

It lies on a shelf, under a name for each of the two newest rounds: a server that was killed and
plays a round again finds what was there before that round.
"""

from collections.abc import Mapping, MutableMapping

import numpy as np
from safetensors.numpy import load, save

from adapters.adapter import FloatArray

PREFIX = "memory-"
KEPT = 2


def remember(
    shelf: MutableMapping[str, bytes], server_round: int, arrays: Mapping[str, FloatArray]
) -> None:
    """Keep these arrays as what the client had after this round.

    >>> shelf = {}
    >>> remember(shelf, 3, {"b": np.ones(2, np.float32)})
    >>> recall(shelf, 3)["b"].tolist(), recall(shelf, 2)
    ([1.0, 1.0], {})
    """
    for name in _rounds(shelf):
        if _number(name) >= server_round:  # of a round that is played again
            del shelf[name]
    rows = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    shelf[f"{PREFIX}{server_round:06d}"] = save(rows)
    for name in _rounds(shelf)[:-KEPT]:
        del shelf[name]


def recall(shelf: Mapping[str, bytes], up_to_round: int) -> dict[str, FloatArray]:
    """What the client had after its newest round up to this one; empty where there was none."""
    names = [name for name in _rounds(shelf) if _number(name) <= up_to_round]
    return dict(load(shelf[names[-1]])) if names else {}


def _rounds(shelf: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in shelf if name.startswith(PREFIX))


def _number(name: str) -> int:
    return int(name.removeprefix(PREFIX))
