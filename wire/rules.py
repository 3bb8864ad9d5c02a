"""What a method asks of a client: which factors train and travel, at which rank."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from settings.keys import key

Factor: TypeAlias = Literal["A", "B", "both"]
A: Literal["A"] = "A"
B: Literal["B"] = "B"
BOTH: Literal["both"] = "both"
FACTORS: tuple[Factor, ...] = (A, B, BOTH)
CONTROL = "control"
"""The record of a control variate, and its name in a method's state."""


@dataclass(frozen=True)
class LocalRule:
    """What a method asks of a client in one round; the defaults are plain LoRA training."""

    trains: Factor = key("The factors that train.", default=BOTH)
    sends: Factor = key(
        "The factors that travel up. What does not is as it was in the start.",
        default=BOTH,
    )
    receives: Factor = key(
        "The factors of the start that travel down. An A that does not is drawn from the run's "
        "seed, a B that does not is zero.",
        default=BOTH,
    )
    keeps_b: bool = key(
        "The client keeps its own B from round to round and never sends it.", default=False
    )
    keeps_head: bool = key(
        "A classifier's head, too, is the client's own; clients.head may say otherwise.",
        default=False,
    )
    freezes_tail: bool = key(
        "Directions of the start beyond a client's rank stay in its model, frozen, and the server "
        "adds them to its reply; otherwise the client never sees them.",
        default=False,
    )
    rank: int = key("The client trains at most this rank; 0: its own.", default=0, at_least=0)
    prune: float = key(
        "The client lowers its rank to this share of it when the rest shrank in training.",
        default=1.0,
        above=0,
        at_most=1,
    )
    min_rank: int = key(
        "No client prunes below this rank, or its own where that is lower.", default=1, at_least=0
    )
    proximal: float = key(
        "Weight in the client's loss of half the squared distance of its factors from where they "
        "began.",
        default=0.0,
        at_least=0,
    )
    control: bool = key(
        "The client corrects each gradient by control variates: it receives the server's, keeps its"
        " own, and sends by how much that changed.",
        default=False,
    )
    penalty: float = key(
        "Weight in the client's loss of sum over modules ||B_rest||_F ||A_rest||_F.",
        default=0.0,
        at_least=0,
    )
