"""A message becomes a job, and what comes of the job a reply.

    message -> Instruction, merged, start -> Job -> (training) -> TrainReply

A job is all that a client needs besides its base model and its data. Whoever plays a client, with a
model or without one, opens its jobs here.
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property

from flwr.app import ArrayRecord, RecordDict

from adapters.adapter import Adapter, Delta, Factors, FloatArray, Shapes
from adapters.algebra import relative_error
from adapters.head import Head, HeadShapes
from client.kept import (
    as_own_control,
    as_own_head,
    own_control,
    own_head,
    recall,
    remember,
)
from client.received import model_of
from client.starting import starting_factors, with_frozen_tail, with_own_b
from wire.codec import pack, unpack
from wire.head import pack_head, unpack_head
from wire.messages import Instruction, Stamp, TrainMetrics, TrainReply
from wire.records import from_record
from wire.rules import CONTROL

Shelf = MutableMapping[str, bytes]


@dataclass(frozen=True, eq=False)
class Job:
    """What one message asks of this client."""

    instruction: Instruction
    shapes: Shapes
    rank: int
    """The rank to train."""
    merged: Delta | None
    start: Adapter | None
    head: bytes | None
    """As it came, packed."""
    control: Adapter | None
    """The server's control variate, where it has one."""
    kept: Mapping[str, FloatArray]
    """What this client kept of its rounds before."""
    shelf: Shelf

    @cached_property
    def frozen(self) -> Delta | None:
        """What stays as it is on top of the base: merged, and the start's frozen tail if any."""
        if self.start is not None and self.instruction.rule.freezes_tail:
            return with_frozen_tail(self.merged, self.start, self.rank)
        return self.merged

    @cached_property
    def begin(self) -> Adapter:
        """The factors that training begins from."""
        told = self.instruction
        scale = told.lora.scale_of(self.rank)
        begin = starting_factors(self.start, self.shapes, self.rank, scale, told.seed)
        return with_own_b(begin, self.kept) if told.rule.keeps_b else begin

    @cached_property
    def own_control(self) -> Adapter | None:
        """The client's control variate; None where it has none yet."""
        return own_control(self.kept, self.shapes, self.rank)

    def head_of(self, shapes: HeadShapes) -> Head | None:
        """The client's own head where it keeps one, else that which came; None: neither is there.

        shapes: the base model's.
        """
        own = own_head(self.kept) if self.instruction.rule.keeps_head else {}
        if own and {n: v.shape for n, v in own.items()} == dict(shapes):
            return own
        return None if self.head is None else unpack_head(self.head, shapes)

    def stamp(self, data: str) -> Stamp:
        """What a reply to this job belongs to; data: the hash of those that it is made of."""
        return Stamp(self.instruction.round, self.instruction.base, data)

    def reply(
        self,
        adapter: Adapter,
        metrics: TrainMetrics,
        data: str,
        head: Head | None = None,
        moments: Mapping[str, FloatArray] | None = None,
        control: Adapter | None = None,
    ) -> TrainReply:
        """Keep what stays with this client, and pack what travels.

        adapter, head: as trained.  metrics: without the error of the wire.
        moments: of the optimizer, where the next round goes on with them.
        control: this client's control variate after the round.
        """
        told, rule = self.instruction, self.instruction.rule
        keep = dict(moments or {})
        if rule.keeps_b:
            keep |= {name: factors.b for name, factors in adapter.items()}
        if rule.keeps_head:
            keep |= as_own_head(head or {})
        if control is not None:
            keep |= as_own_control(control)
        if keep:
            remember(self.shelf, told.round, keep)
        packed = pack(adapter, told.wire_dtype, rule.sends)
        if told.wire_dtype != "float32":
            error = relative_error([adapter], [unpack(packed, adapter)])
            metrics = metrics.with_wire_error(error)
        sent_head = pack_head(head) if head and not rule.keeps_head else None
        moved = None if control is None else pack(_less(control, self.own_control))
        return TrainReply(self.stamp(data), packed, metrics, sent_head, moved)


def _less(control: Adapter, before: Adapter | None) -> Adapter:
    """By how much a control variate changed."""
    if before is None:
        return control
    return Adapter(
        {n: Factors(f.a - before[n].a, f.b - before[n].b, 1.0) for n, f in control.items()}
    )


def open_job(
    content: RecordDict,
    instruction: Instruction,
    shapes: Shapes,
    rank: int,
    shelf: Shelf,
    up_to_round: int,
) -> Job:
    """The job in a message; BouquetError where the model in it does not fit.

    rank: the client's own.  up_to_round: the last round of which it may remember something.
    """
    rank = instruction.rank_of(rank)
    merged, start = model_of(content, shapes, rank, instruction, shelf)
    head, control = content.get("head"), content.get(CONTROL)
    return Job(
        instruction,
        shapes,
        rank,
        merged,
        start,
        from_record(head) if isinstance(head, ArrayRecord) else None,
        unpack(from_record(control)) if isinstance(control, ArrayRecord) else None,
        recall(shelf, up_to_round),
        shelf,
    )
