"""What goes out to the clients: the global model, packed once, and each client's orders."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict

from adapters.adapter import Adapter, Delta
from adapters.algebra import relative_error
from adapters.terms import Term, sum_of_terms
from server.member import Member
from server.pieces import distinct, start_piece
from settings.keys import flatten
from settings.knobs import KNOBS, RETIRED
from settings.run import MAY_CHANGE_ON_RESUME, RunSettings
from settings.seeds import derive_seed, start_seed
from strategies.strategy import GlobalModel, Strategy
from wire.codec import pack, unpack, unpack_delta
from wire.messages import Instruction, Parts
from wire.model import pack_model
from wire.pieces import Piece
from wire.records import PIECE, from_record, to_record
from wire.rules import BOTH, CONTROL, LocalRule

LIVES_FOR = 1.5
"""Deadlines that a message lives: a site that comes back later finds no work of an old round."""


@dataclass(frozen=True)
class Asked:
    """A client of this round's cohort, and what the method asks of it."""

    member: Member
    rule: LocalRule

    @property
    def rank(self) -> int:
        """The rank that it is asked to train."""
        return min(self.member.rank, self.rule.rank) if self.rule.rank else self.member.rank


@dataclass(frozen=True, eq=False)
class Broadcast:
    """The global model as it goes out: packed once, the same records for every client."""

    records: RecordDict
    num_bytes: int
    version: str
    """Hash of what the clients receive; names this global model in logs."""
    rounded: bool = False
    """What the clients receive is not exactly the global model."""
    pieces: tuple[Piece, ...] | None = None
    """The terms of merged, of which each client gets those that it lacks; None: it is in
    `records`, whole."""
    start_piece: str = ""
    """The version of the piece that the start is; empty: it is in `records`, where there is one."""

    def lacking(self, member: Member) -> list[Piece]:
        """The pieces that this client must be sent."""
        return [p for p in distinct(self.pieces or ()) if p.version not in member.holds]

    def records_for(self, member: Member) -> dict[str, ArrayRecord]:
        """What this client is sent."""
        parts = {PIECE + p.version: to_record(p.packed) for p in self.lacking(member)}
        return {**self.records.array_records, **parts}

    def bytes_for(self, member: Member) -> int:
        """How much that is, packed."""
        return self.num_bytes + sum(len(piece.packed) for piece in self.lacking(member))


def ask(
    cohort: Sequence[Member], strategy: Strategy, model: GlobalModel, head: str = "auto"
) -> list[Asked]:
    """The rule for each member of the cohort.

    head: clients.head; `auto` leaves it to the strategy who keeps a classifier's head.
    """
    asked = []
    for member in cohort:
        rule = strategy.local_rule(model, member.name)
        if head != "auto":
            rule = replace(rule, keeps_head=head == "own")
        asked.append(Asked(member, rule))
    return asked


def broadcast(
    model: GlobalModel,
    wire_dtype: str,
    receives: str = BOTH,
    pieces: tuple[Piece, ...] | None = None,
    control: bool = False,
) -> Broadcast:
    """Pack `merged`, `start` and `head`; what is None is left out.

    receives: the factors of `start` that travel.
    control: the server's control variate travels, too, where there is one.
    pieces: what merged is the sum of, where it travels so.
    """
    start = "" if receives != BOTH else start_piece(pieces or (), model.start, wire_dtype)
    parts = pack_model(
        None if pieces is not None else model.merged,
        None if start else model.start,
        model.head,
        wire_dtype=wire_dtype,
        receives=receives,
    )
    packed = {name.removesuffix(".safetensors"): data for name, data in parts.items()}
    if control and isinstance(held := model.state.get(CONTROL), Adapter):
        packed[CONTROL] = pack(held)
    digest = hashlib.sha256()
    for name, data in packed.items():
        digest.update(name.encode() + data)
    for piece in pieces or ():
        digest.update(f"{piece.kind}{piece.version}".encode())
    digest.update(start.encode())
    return Broadcast(
        RecordDict({name: to_record(data) for name, data in packed.items()}),
        sum(len(data) for data in packed.values()),
        digest.hexdigest()[:16],
        rounded=wire_dtype != "float32",
        pieces=pieces,
        start_piece=start,
    )


def broadcast_error(model: GlobalModel, sent: Broadcast) -> float:
    """||delta - delta as sent||_F / ||delta||_F of the global model, merged and start together.

    0 where the number format on the wire is exact, or where there is no delta yet.
    """
    if not sent.rounded:
        return 0.0
    whole: list[Delta] = [part for part in (model.merged, model.start) if part is not None]
    start = received_start(model, sent)
    merged = sum_of_terms([Term(p.kind, unpack_delta(p.packed)) for p in sent.pieces or ()], start)
    if "merged" in sent.records:
        merged = unpack_delta(from_record(sent.records["merged"]))
    came: list[Delta] = [part for part in (merged, start) if part is not None]
    return relative_error(whole, came)


def received_start(model: GlobalModel, sent: Broadcast) -> Adapter | None:
    """`start` as the clients have it: rounded where the number format on the wire is."""
    if model.start is None or not sent.rounded:
        return model.start
    if sent.start_piece:
        (packed,) = {p.packed for p in sent.pieces or () if p.version == sent.start_piece}
        return unpack(packed)
    return unpack(from_record(sent.records["start"]), model.start)


def broadcast_to(
    asked: Sequence[Asked],
    model: GlobalModel,
    wire_dtype: str,
    pieces: tuple[Piece, ...] | None = None,
) -> Broadcast:
    """What this cohort receives; a method asks all of it for the same factors."""
    rule = asked[0].rule if asked else LocalRule()
    return broadcast(model, wire_dtype, rule.receives, pieces, rule.control)


def run_name(settings: RunSettings) -> str:
    """What sites file under what they keep of this run: the same for every take-up of it."""
    fixed = {n: v for n, v in flatten(settings).items() if n not in MAY_CHANGE_ON_RESUME}
    if not fixed[KNOBS]:  # as it was named when every method's knobs were keys of each run
        del fixed[KNOBS]
        fixed |= RETIRED
    told = [Path(settings.output).name, *sorted(fixed.items())]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def round_messages(
    kind: str,
    asked: Sequence[Asked],
    sent: Broadcast,
    settings: RunSettings,
    server_round: int,
    base: str,
) -> list[Message]:
    """A `train` or `evaluate` message for each member of the cohort."""
    parts = None
    if sent.pieces is not None:
        versions, kinds = tuple(p.version for p in sent.pieces), tuple(p.kind for p in sent.pieces)
        parts = Parts(versions, kinds, sent.start_piece)
    return [
        Message(
            RecordDict(
                {
                    **sent.records_for(each.member),
                    **Instruction(
                        run=run_name(settings),
                        round=server_round,
                        base=base,
                        version=sent.version,
                        seed=derive_seed(settings.seed, server_round, each.member.name),
                        start_seed=start_seed(settings),
                        wire_dtype=settings.wire.dtype,
                        optimizer=settings.start.optimizer,
                        rule=each.rule,
                        lora=settings.lora,
                        local=settings.local,
                        parts=parts,
                    ).to_records(),
                }
            ),
            dst_node_id=each.member.node_id,
            message_type=kind,
            group_id=str(server_round),
            ttl=LIVES_FOR * settings.clients.timeout_seconds,
        )
        for each in asked
    ]
