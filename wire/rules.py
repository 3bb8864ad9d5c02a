"""What a method asks of a client: which factors train and travel, at which rank."""

from dataclasses import dataclass

BOTH = "both"


@dataclass(frozen=True)
class LocalRule:
    """What a method asks of a client in one round; the defaults are plain LoRA training."""

    trains: str = BOTH
    """The factors that train: `A`, `B` or `both`."""
    sends: str = BOTH
    """The factors that travel up. What does not is as it was in `start`."""
    receives: str = BOTH
    """The factors of `start` that travel down. An A that does not is drawn from the run's seed, a B
    that does not is zero."""
    keeps_b: bool = False
    """The client keeps its own B from round to round and never sends it."""
    keeps_head: bool = False
    """A classifier's head, too, is the client's own; clients.head may say otherwise."""
    freezes_tail: bool = False
    """Directions of `start` beyond a client's rank stay in its model, frozen, and the server adds
    them to its reply; otherwise the client never sees them."""
    rank: int = 0
    """The client trains at most this rank; 0: its own."""
    prune: float = 1.0
    """The client lowers its rank to this share of it when the rest shrank in training."""
    min_rank: int = 1
    """No client prunes below this rank, or its own where that is lower."""
    penalty: float = 0.0
    """Weight in the client's loss of sum over modules ||B_rest||_F ||A_rest||_F."""
