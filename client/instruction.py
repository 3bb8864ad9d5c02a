"""What the server tells a client to do in a round, read from its message."""

from dataclasses import dataclass
from typing import Any

from flwr.app import RecordDict

from core.errors import BouquetError
from settings.keys import parse
from settings.run import LocalSettings, LoraSettings


@dataclass(frozen=True)
class Instruction:
    """One round's orders; nothing in it names a method."""

    run: str
    """What a site files under what it keeps of this run."""
    round: int
    version: str
    """Names the global model that came, in logs."""
    seed: int
    start_seed: int
    """What `start` leaves out is drawn from it, the same on every site."""
    base: str
    pieces: tuple[str, ...] | None
    """Versions of the parts of merged, where it travels in pieces."""
    piece_kinds: tuple[str, ...]
    """What each of them is to the sum: plus, minus or step."""
    start_piece: str
    """The version of the piece that `start` is; empty: it travels by itself, or there is none."""
    wire_dtype: str
    trains: str
    """The factors that train: `A`, `B` or `both`."""
    sends: str
    """The factors that travel back."""
    receives: str
    """The factors of `start` that travelled here."""
    keeps_b: bool
    """B is this client's own: kept from round to round, never sent."""
    keeps_head: bool
    """A classifier's head is this client's own: kept from round to round, never sent."""
    freezes_tail: bool
    """Directions of `start` beyond the client's rank stay in its model, frozen."""
    rank: int
    """Train at most this rank; 0: the client's own."""
    prune: float
    """Share of its rank that the client keeps when the rest shrank in training; 1: all of it."""
    min_rank: int
    """It prunes to no rank below this."""
    penalty: float
    """Weight of the norm of that rest in the loss."""
    optimizer: str
    """`fresh`, or `kept` from this client's last round."""
    lora: LoraSettings
    local: LocalSettings

    def rank_of(self, own: int) -> int:
        """The rank to train: the client's own, unless it is told less."""
        return min(own, self.rank) if self.rank else own


def read_instruction(content: RecordDict) -> Instruction:
    """BouquetError where the message comes from a server of another version."""
    try:
        told: Any = content["instruction"]
        return Instruction(
            run=told["run"],
            round=told["round"],
            version=told["version"],
            seed=told["seed"],
            start_seed=told["start-seed"],
            base=told["base"],
            pieces=tuple(told["pieces"]) if "pieces" in told else None,
            piece_kinds=tuple(told.get("piece-kinds", ())),
            start_piece=told.get("start-piece", ""),
            wire_dtype=told["wire-dtype"],
            trains=told["rule.trains"],
            sends=told["rule.sends"],
            receives=told["rule.receives"],
            keeps_b=told["rule.keeps-b"],
            keeps_head=told["rule.keeps-head"],
            freezes_tail=told["rule.freezes-tail"],
            rank=told["rule.rank"],
            prune=told["rule.prune"],
            min_rank=told["rule.min-rank"],
            penalty=told["rule.penalty"],
            optimizer=told["start.optimizer"],
            lora=parse(LoraSettings, told, "lora."),
            local=parse(LocalSettings, told, "local."),
        )
    except KeyError as error:
        raise BouquetError(
            f"the server's message lacks {error}: server and site need the same version of bouquet"
        ) from None
