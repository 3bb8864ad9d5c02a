"""What of the clients' answers is let in.

A client is a stranger: every reply is checked before it is decoded or summed. A bad one is turned
into a Rejection that says why, and the round goes on as if that client had not answered.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from adapters.adapter import Adapter, largest
from adapters.algebra import truncate
from adapters.codec import budget_bytes, limits_of, unpack
from adapters.errors import AdapterError, listing, quoted
from adapters.head import Head, head_budget_bytes, unpack_head
from adapters.pruning import kept_rank
from adapters.records import from_record
from server.broadcast import Asked
from server.roster import Member, Roster
from settings.run import RunSettings
from strategies.strategy import BOTH

MAX_EXAMPLES = 10**9
MAX_METRIC = 10**18
"""Sums and products of a few of these are still numbers."""
COUNTS = ("tokens", "steps", "examples-seen", "seconds", "peak-bytes")
MAX_SCALE = 1e4
MAX_FACTOR = 1e4
"""No trained factor comes near; larger values are damage or malice."""


@dataclass(frozen=True, eq=False)
class Reply:
    """A client's admitted answer to a train message."""

    member: Member
    """With the rank that it was asked to train; the adapter's may be lower, where it pruned."""
    adapter: Adapter
    num_examples: int
    metrics: dict[str, float]
    bytes_up: int
    head: Head | None = None


@dataclass(frozen=True)
class Rejection:
    """A client whose answer does not count this round, and why."""

    client: str
    reason: str


@dataclass(frozen=True, eq=False)
class Admitted:
    """What became of a cohort's answers; every list is in roster order."""

    replies: list[Reply]
    rejected: list[Rejection]
    spare: list[str]
    """Clients that were not waited for any more, because enough others had answered."""


def admit_replies(
    answers: Iterable[Message],
    cohort: Sequence[Asked],
    start: Adapter | None,
    roster: Roster,
    settings: RunSettings,
    server_round: int,
    enough: int | None = None,
) -> Admitted:
    """Check each answer as it comes, until `enough` (default: all) of the cohort are usable.

    start: what the cohort was sent; a factor that did not train does not come back. Of two answers
    of one client the first counts, and one from outside the cohort is not heard.
    """
    waiting = {asked.member.node_id: asked for asked in cohort}
    replies: dict[int, Reply] = {}
    rejected: dict[int, Rejection] = {}
    for answer in answers:
        node = answer.metadata.src_node_id
        asked = waiting.pop(node, None)
        if asked is None:
            continue
        try:
            replies[node] = _admit(answer, asked, start, roster, settings.wire.dtype, server_round)
        except AdapterError as error:
            rejected[node] = Rejection(asked.member.name, str(error))
        if len(replies) == enough:
            break
    spare = []
    for node, asked in waiting.items():
        if len(replies) == enough:
            spare.append(asked.member.name)
        else:
            silent = f"no reply within {settings.clients.timeout_seconds:g} s"
            rejected[node] = Rejection(asked.member.name, silent)
    order = [asked.member.node_id for asked in cohort]
    return Admitted(
        [replies[node] for node in order if node in replies],
        [rejected[node] for node in order if node in rejected],
        spare,
    )


def reply_bytes(cohort: Sequence[Asked], roster: Roster, wire_dtype: str) -> dict[int, int]:
    """Node -> the most bytes that the adapter and the head of its reply can need."""
    head = head_budget_bytes(roster.head_shapes) if roster.head_shapes else 0
    return {
        asked.member.node_id: budget_bytes(roster.shapes, asked.member.rank, wire_dtype) + head
        for asked in cohort
    }


def _admit(
    message: Message,
    asked: Asked,
    start: Adapter | None,
    roster: Roster,
    wire_dtype: str,
    server_round: int,
) -> Reply:
    member = asked.member
    content = open_reply(message, server_round, roster.base, member.data)
    packed = from_record(
        content.get("adapter"), limit=budget_bytes(roster.shapes, member.rank, wire_dtype)
    )
    known = None
    if asked.rule.sends != BOTH and start is not None:
        known = truncate(start, member.rank)
    limits = limits_of(roster.shapes, member.rank, asked.rule.sends)
    adapter = unpack(packed, known, limits)
    check_adapter(adapter, asked, roster.shapes)
    head, head_bytes = _admit_head(content, asked, roster)
    metrics = read_metrics(content)
    num_examples = metrics.pop("num-examples", 0)
    if num_examples != int(num_examples) or not 0 < num_examples <= MAX_EXAMPLES:
        raise AdapterError(
            f"num-examples must be a whole number from 1 to {MAX_EXAMPLES:,}; got {num_examples:g}"
        )
    return Reply(member, adapter, int(num_examples), metrics, len(packed) + head_bytes, head=head)


def _admit_head(content: RecordDict, asked: Asked, roster: Roster) -> tuple[Head | None, int]:
    """The head of a reply and its bytes, where the task has one and it travels."""
    if not roster.head_shapes:
        return None, 0
    if asked.rule.keeps_head:
        if "head" in content:
            raise AdapterError("a head came, though each client of this run keeps its own")
        return None, 0
    packed = from_record(content.get("head"), limit=head_budget_bytes(roster.head_shapes))
    head = unpack_head(packed, roster.head_shapes)
    for name, values in head.items():
        check_size(name, largest(values))
    return head, len(packed)


def open_reply(message: Message, server_round: int, base: str, data: str = "") -> RecordDict:
    """The content of a reply that belongs to this round, base and data; AdapterError otherwise.

    data: the hash that the client told when it was asked who it is; empty where it told none.
    """
    if message.has_error():
        error = message.error
        raise AdapterError(f"the client failed: {quoted(error.reason or error.code)}")
    content = message.content
    if "failure" in content:
        failure = content["failure"]
        raise AdapterError(f"the client reports: {quoted(failure.get('reason'))}")
    stamp = content.get("reply")
    if not isinstance(stamp, ConfigRecord) or stamp.get("round") != server_round:
        came = stamp.get("round") if isinstance(stamp, ConfigRecord) else None
        raise AdapterError(f"expected a reply to round {server_round}; got one to {came!r:.40}")
    if stamp.get("base") != base:
        raise AdapterError(f"trained on base {stamp.get('base')!r:.40}; the run's is {base!r}")
    if data and stamp.get("data") != data:
        raise AdapterError(
            f"its data changed since the run began (hash {stamp.get('data')!r:.40}, before "
            f"{data!r:.40}): bring them back, or begin a new run"
        )
    return content


def read_metrics(content: RecordDict) -> dict[str, float]:
    """The reply's metrics as plain numbers, finite and of a sane size."""
    record = content.get("metrics")
    if not isinstance(record, MetricRecord):
        raise AdapterError("the reply has no MetricRecord 'metrics'")
    metrics = {}
    for name, value in record.items():
        if not isinstance(value, int | float) or not abs(value) <= MAX_METRIC:  # NaN is not
            raise AdapterError(
                f"metric {name!r:.40} must be a finite number, at most {MAX_METRIC:g}; got "
                f"{value!r:.40}"
            )
        metrics[name] = float(value)
    for name in COUNTS:
        if metrics.get(name, 0.0) < 0.0:
            raise AdapterError(f"{name} cannot be below zero; got {metrics[name]:g}")
    return metrics


def check_adapter(adapter: Adapter, asked: Asked, shapes: Mapping[str, tuple[int, int]]) -> None:
    """AdapterError unless the adapter fits the base model, the client's rank and sane numbers."""
    if adapter.shapes != dict(shapes):
        odd = set(adapter.shapes.items()) ^ set(shapes.items())
        raise AdapterError(
            f"modules or shapes differ from the base model's: {listing(sorted(odd))}"
        )
    wanted = asked.member.rank
    if adapter.rank == kept_rank(wanted, asked.rule.prune, asked.rule.min_rank):
        wanted = adapter.rank
    for name, factors in adapter.items():
        if factors.rank != wanted:
            raise AdapterError(f"{name} has rank {factors.rank}; this client's is {wanted}")
        if not 0.0 < factors.scale <= MAX_SCALE:
            raise AdapterError(f"{name} has scale {factors.scale:g}; expected (0, {MAX_SCALE:g}]")
        for half in (factors.a, factors.b):
            check_size(name, largest(half))


def check_size(name: str, largest: float) -> None:
    """AdapterError for values that no training reaches."""
    if not largest <= MAX_FACTOR:  # NaN is not
        raise AdapterError(f"{name} holds {largest:g}; trained factors stay below {MAX_FACTOR:g}")
