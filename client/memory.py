"""What a client keeps from round to round, where a method asks for it.

It lies in the state that Flower keeps for each node, one record for each of the two newest rounds:
a server that was killed and goes on with a round again finds what was there before that round.
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from safetensors.numpy import load, save

from adapters.adapter import FloatArray
from adapters.records import from_record, to_record

PREFIX = "memory-"
KEPT = 2


def remember(state: RecordDict, server_round: int, arrays: Mapping[str, FloatArray]) -> None:
    """Keep these arrays as what the client had after this round.

    >>> state = RecordDict()
    >>> remember(state, 3, {"b": np.ones(2, np.float32)})
    >>> recall(state, 3)["b"].tolist(), recall(state, 2)
    ([1.0, 1.0], {})
    """
    for name in _rounds(state):
        if _number(name) >= server_round:  # of a round that is played again
            del state[name]
    rows = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    state[f"{PREFIX}{server_round:06d}"] = to_record(save(rows))
    for name in _rounds(state)[:-KEPT]:
        del state[name]


def recall(state: RecordDict, up_to_round: int) -> dict[str, FloatArray]:
    """What the client had after its newest round up to this one; empty where there was none."""
    names = [name for name in _rounds(state) if _number(name) <= up_to_round]
    if not names:
        return {}
    record = state[names[-1]]
    assert isinstance(record, ArrayRecord)
    return dict(load(from_record(record)))


def _rounds(state: RecordDict) -> list[str]:
    return sorted(name for name in state if name.startswith(PREFIX))


def _number(name: str) -> int:
    return int(name.removeprefix(PREFIX))
