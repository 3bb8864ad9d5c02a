"""What a client keeps from round to round, where a method asks for it.

It lies on a shelf, under a name for each of the two newest rounds: a server that was killed and
plays a round again finds what was there before that round.
"""

from collections.abc import Mapping, MutableMapping

import numpy as np
from safetensors.numpy import load, save

from adapters.adapter import Adapter, Factors, FloatArray, Shapes
from adapters.head import Head

PREFIX = "memory-"
HEAD = "head/"
"""Before the names of a head's arrays, which could be those of modules."""
OWN_CONTROL = "control/"
"""Before the names of a control variate's."""
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


def as_own_head(head: Head) -> dict[str, FloatArray]:
    """A head under the names by which it is remembered.

    >>> own_head(as_own_head({"score.weight": np.ones(2, np.float32)}))["score.weight"].tolist()
    [1.0, 1.0]
    """
    return {HEAD + name: values for name, values in head.items()}


def own_head(kept: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """The head among what was remembered; empty where there is none."""
    return {n.removeprefix(HEAD): values for n, values in kept.items() if n.startswith(HEAD)}


def as_own_control(control: Adapter) -> dict[str, FloatArray]:
    """A control variate under the names by which it is remembered."""
    found: dict[str, FloatArray] = {}
    for name, f in control.items():
        found |= {f"{OWN_CONTROL}A/{name}": f.a, f"{OWN_CONTROL}B/{name}": f.b}
    return found


def own_control(kept: Mapping[str, FloatArray], shapes: Shapes, rank: int) -> Adapter | None:
    """The control variate among what was remembered; None where there is none of this rank."""
    modules = {}
    for name, (m, n) in shapes.items():
        a, b = kept.get(f"{OWN_CONTROL}A/{name}"), kept.get(f"{OWN_CONTROL}B/{name}")
        if a is None or b is None or (a.shape, b.shape) != ((rank, n), (m, rank)):
            return None
        modules[name] = Factors(a, b, 1.0)
    return Adapter(modules)


def _rounds(shelf: Mapping[str, bytes]) -> list[str]:
    return sorted(name for name in shelf if name.startswith(PREFIX))


def _number(name: str) -> int:
    return int(name.removeprefix(PREFIX))
