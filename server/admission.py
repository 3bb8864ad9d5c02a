"""Admission: which replies count, and why the others do not.

A client is a stranger: every reply is checked before it is decoded or summed. A bad one is turned
into a Rejection that says why, and the round goes on as if that client had not answered.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from adapters.adapter import Adapter, largest
from adapters.algebra import truncate
from adapters.head import Head
from adapters.pruning import kept_rank
from core.errors import AdapterError, BouquetError, ReplyError, listing, quoted
from server.broadcast import Asked
from server.names import refuse_removed
from server.roster import Roster
from settings.run import RunSettings
from wire.codec import budget_bytes, limits_of, unpack
from wire.head import head_budget_bytes, unpack_head
from wire.messages import TRAIN_RECORDS, Stamp, TrainMetrics, TrainReply, records_of
from wire.rules import BOTH, CONTROL

LONGEST_REASON = 600
MAX_SCALE = 1e4
MAX_FACTOR = 1e4
"""No trained factor comes near; larger values are damage or malice."""


@dataclass(frozen=True, eq=False)
class Reply:
    """A client's admitted answer to a train message."""

    asked: Asked
    adapter: Adapter
    """Its rank may be lower than was asked, where the client pruned."""
    metrics: TrainMetrics
    bytes_up: int
    head: Head | None = None
    control: Adapter | None = None
    """By how much its control variate changed."""

    @property
    def client(self) -> str:
        """The client's name."""
        return self.asked.member.name


@dataclass(frozen=True)
class Rejection:
    """A client whose answer does not count this round, and why."""

    client: str
    reason: str


@dataclass(frozen=True, eq=False)
class Admitted:
    """What became of a cohort's answers; every list is in the order in which they were asked."""

    replies: list[Reply]
    rejected: list[Rejection]
    spare: list[str]
    """Clients that were not waited for any more, because enough others had answered."""

    def with_more(self, later: "Admitted") -> "Admitted":
        """With what became of clients that were asked after these."""
        return Admitted(
            [*self.replies, *later.replies],
            [*self.rejected, *later.rejected],
            [*self.spare, *later.spare],
        )


def rejection(client: str, error: BouquetError, during: str = "") -> Rejection:
    """Of a client whose answer is not what it should be; its own words in it cut and escaped."""
    return Rejection(client, quoted(f"{during}{error}", LONGEST_REASON))


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
            replies[node] = _admit(answer, asked, start, roster, settings, server_round)
        except (AdapterError, ReplyError) as error:
            rejected[node] = rejection(asked.member.name, error)
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
    """Node -> the most bytes that the arrays of its reply can need."""
    head = head_budget_bytes(roster.head_shapes) if roster.head_shapes else 0
    return {
        asked.member.node_id: budget_bytes(roster.shapes, asked.rank, wire_dtype)
        + head
        + (budget_bytes(roster.shapes, asked.rank) if asked.rule.control else 0)
        for asked in cohort
    }


def _admit(
    message: Message,
    asked: Asked,
    start: Adapter | None,
    roster: Roster,
    settings: RunSettings,
    server_round: int,
) -> Reply:
    sends_head = bool(roster.head_shapes) and not asked.rule.keeps_head
    unasked = {"head": not sends_head, CONTROL: not asked.rule.control}
    allowed = TRAIN_RECORDS - {name for name in unasked if unasked[name]}
    content, stamp = open_reply(message, allowed, server_round, roster.base, asked.member.card.data)
    came = TrainReply.from_records(
        content,
        stamp,
        adapter_bytes=budget_bytes(roster.shapes, asked.rank, settings.wire.dtype),
        head_bytes=head_budget_bytes(roster.head_shapes) if sends_head else None,
        control_bytes=budget_bytes(roster.shapes, asked.rank) if asked.rule.control else None,
        least_examples=settings.clients.min_examples,  # believed when it was asked, held here
    )
    known = None
    if asked.rule.sends != BOTH and start is not None:
        known = truncate(start, asked.rank)
    limits = limits_of(roster.shapes, asked.rank, asked.rule.sends)
    adapter = unpack(came.adapter, known, limits)
    check_adapter(adapter, asked, roster.shapes)
    head = None if came.head is None else _checked_head(came.head, roster)
    control = None
    if came.control is not None:
        control = unpack(came.control, limits=limits_of(roster.shapes, asked.rank))
        _check_control(control, asked.rank, roster.shapes)
    return Reply(asked, adapter, came.metrics, came.num_bytes, head, control)


def _check_control(control: Adapter, rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """AdapterError unless these are gradients of A and B, one for each value that trained."""
    if control.shapes != dict(shapes):
        raise AdapterError("its control variate has modules or shapes that the base has not")
    for name, f in control.items():
        if (f.rank, f.scale) != (rank, 1.0):
            raise AdapterError(
                f"its control variate has rank {f.rank} and scale {f.scale:g} in {name}; expected "
                f"{rank} and 1"
            )
        for half in (f.a, f.b):
            check_size(f"the control variate of {name}", largest(half))


def _checked_head(packed: bytes, roster: Roster) -> Head:
    head = unpack_head(packed, roster.head_shapes)
    for name, values in head.items():
        check_size(name, largest(values))
    return head


def open_reply(
    message: Message, allowed: frozenset[str], server_round: int, base: str, data: str = ""
) -> tuple[RecordDict, Stamp]:
    """The content of a reply that belongs to this round, base and data; ReplyError otherwise.

    allowed: the records that may be in it.
    data: the hash that the client told when it was asked who it is; empty where it told none.
    """
    refuse_removed(message.metadata.src_node_id)
    content = records_of(message, allowed)
    return content, Stamp.from_records(content, server_round, base, data)


def check_adapter(adapter: Adapter, asked: Asked, shapes: Mapping[str, tuple[int, int]]) -> None:
    """AdapterError unless the adapter fits the base model, the client's rank and sane numbers."""
    if adapter.shapes != dict(shapes):
        odd = set(adapter.shapes.items()) ^ set(shapes.items())
        raise AdapterError(
            f"modules or shapes differ from the base model's: {listing(sorted(odd))}"
        )
    wanted = asked.rank
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
