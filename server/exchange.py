"""What goes to the clients, and what of their answers is let in.

A client is a stranger: every reply is checked before it is decoded or summed. A bad one is turned
into a Rejection that says why, and the round goes on as if that client had not answered.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from adapters.adapter import Adapter
from adapters.codec import budget_bytes, pack, unpack
from adapters.errors import AdapterError, listing
from adapters.records import from_record, to_record
from server.roster import Member, Roster
from server.sampling import derive_seed
from settings.keys import flatten
from settings.run import RunSettings
from strategies.strategy import GlobalModel

MAX_EXAMPLES = 10**9
MAX_SCALE = 1e4
MAX_FACTOR = 1e4
"""No trained factor comes near; larger values are damage or malice."""


@dataclass(frozen=True, eq=False)
class Reply:
    """A client's admitted answer to a train message."""

    member: Member
    adapter: Adapter
    num_examples: int
    metrics: dict[str, float]
    bytes_up: int


@dataclass(frozen=True)
class Rejection:
    """A client whose answer does not count this round, and why."""

    client: str
    reason: str


@dataclass(frozen=True, eq=False)
class Broadcast:
    """The global model as it goes out: packed once, the same records for every client."""

    records: RecordDict
    num_bytes: int
    version: str
    """Hash of what the clients receive; names this global model in logs."""


def broadcast(model: GlobalModel, wire_dtype: str) -> Broadcast:
    """Pack `merged` and `start`; what is None is left out."""
    packed = {
        name: pack(part, wire_dtype)
        for name, part in (("merged", model.merged), ("start", model.start))
        if part is not None
    }
    digest = hashlib.sha256()
    for name, data in packed.items():
        digest.update(name.encode() + data)
    return Broadcast(
        RecordDict({name: to_record(data) for name, data in packed.items()}),
        sum(len(data) for data in packed.values()),
        digest.hexdigest()[:16],
    )


def round_messages(
    kind: str,
    cohort: Sequence[Member],
    sent: Broadcast,
    settings: RunSettings,
    server_round: int,
    base: str,
    trains: str = "both",
) -> list[Message]:
    """A `train` or `evaluate` message for each member of the cohort."""
    shared = {
        "round": server_round,
        "base": base,
        "version": sent.version,
        "trains": trains,
        "wire-dtype": settings.wire.dtype,
        **flatten(settings.lora, "lora."),
        **flatten(settings.local, "local."),
    }
    return [
        Message(
            RecordDict(
                {
                    **sent.records,
                    "instruction": ConfigRecord(
                        {**shared, "seed": derive_seed(settings.seed, server_round, member.name)}
                    ),
                }
            ),
            dst_node_id=member.node_id,
            message_type=kind,
            group_id=str(server_round),
        )
        for member in cohort
    ]


def admit_replies(
    replies: Iterable[Message],
    cohort: Sequence[Member],
    roster: Roster,
    settings: RunSettings,
    server_round: int,
) -> tuple[list[Reply], list[Rejection]]:
    """The usable replies in roster order, and a Rejection for every other member of the cohort."""
    first: dict[int, Message] = {}
    for reply in replies:
        first.setdefault(reply.metadata.src_node_id, reply)
    admitted, rejected = [], []
    for member in cohort:
        try:
            if member.node_id not in first:
                raise AdapterError(f"no reply within {settings.clients.timeout_seconds:g} s")
            admitted.append(
                _admit(first.pop(member.node_id), member, roster, settings.wire.dtype, server_round)
            )
        except AdapterError as error:
            rejected.append(Rejection(member.name, str(error)))
    return admitted, rejected


def _admit(
    message: Message, member: Member, roster: Roster, wire_dtype: str, server_round: int
) -> Reply:
    content = open_reply(message, server_round, roster.base)
    packed = from_record(
        content.get("adapter"), limit=budget_bytes(roster.shapes, member.rank, wire_dtype)
    )
    adapter = unpack(packed)
    check_adapter(adapter, member, roster)
    metrics = read_metrics(content)
    num_examples = metrics.pop("num-examples", 0)
    if num_examples != int(num_examples) or not 0 < num_examples <= MAX_EXAMPLES:
        raise AdapterError(
            f"num-examples must be a whole number from 1 to {MAX_EXAMPLES:,}; got {num_examples:g}"
        )
    return Reply(member, adapter, int(num_examples), metrics, len(packed))


def open_reply(message: Message, server_round: int, base: str) -> RecordDict:
    """The content of a reply that belongs to this round and base; AdapterError otherwise."""
    if message.has_error():
        raise AdapterError(f"the client failed: {message.error.reason or message.error.code}")
    content = message.content
    if "failure" in content:
        failure = content["failure"]
        raise AdapterError(f"the client reports: {str(failure.get('reason'))[:500]}")
    stamp = content.get("reply")
    if not isinstance(stamp, ConfigRecord) or stamp.get("round") != server_round:
        came = stamp.get("round") if isinstance(stamp, ConfigRecord) else None
        raise AdapterError(f"expected a reply to round {server_round}; got one to {came!r:.40}")
    if stamp.get("base") != base:
        raise AdapterError(f"trained on base {stamp.get('base')!r:.40}; the run's is {base!r}")
    return content


def read_metrics(content: RecordDict) -> dict[str, float]:
    """The reply's metrics as plain finite numbers."""
    record = content.get("metrics")
    if not isinstance(record, MetricRecord):
        raise AdapterError("the reply has no MetricRecord 'metrics'")
    metrics = {}
    for name, value in record.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"metric {name!r:.40} must be a finite number; got {value!r:.40}")
        metrics[name] = float(value)
    return metrics


def check_adapter(adapter: Adapter, member: Member, roster: Roster) -> None:
    """AdapterError unless the adapter fits the base model, the client's rank and sane numbers."""
    if adapter.shapes != dict(roster.shapes):
        odd = set(adapter.shapes.items()) ^ set(roster.shapes.items())
        raise AdapterError(
            f"modules or shapes differ from the base model's: {listing(sorted(odd))}"
        )
    for name, factors in adapter.items():
        if factors.rank != member.rank:
            raise AdapterError(f"{name} has rank {factors.rank}; this client's is {member.rank}")
        if not 0.0 < factors.scale <= MAX_SCALE:
            raise AdapterError(f"{name} has scale {factors.scale:g}; expected (0, {MAX_SCALE:g}]")
        largest = max(float(np.abs(half).max(initial=0.0)) for half in (factors.a, factors.b))
        if largest > MAX_FACTOR:
            raise AdapterError(
                f"{name} holds {largest:g}; trained factors stay below {MAX_FACTOR:g}"
            )
