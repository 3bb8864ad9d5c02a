"""What of the clients' answers is let in.

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
from server.answer import TRAIN_RECORDS, Fields, config, metrics, number, records_of, shown
from server.broadcast import Asked
from server.member import MAX_EXAMPLES, Member, holdings
from server.names import refuse_removed
from server.roster import Roster
from settings.run import RunSettings
from wire.codec import budget_bytes, limits_of, unpack
from wire.head import head_budget_bytes, unpack_head
from wire.records import from_record
from wire.rules import BOTH

MAX_COUNT = 10**12
MAX_LOSS = 1e4
"""A nat a token is much; a model that guesses among all of a vocabulary loses 12."""
COUNTS = {
    "num-examples": MAX_EXAMPLES,
    "tokens": MAX_COUNT,
    "steps": MAX_COUNT,
    "examples-seen": MAX_COUNT,
    "peak-bytes": 10**15,
}
MEASURES = {"loss": MAX_LOSS, "seconds": 1e9, "wire-error": 1e4, "accuracy": 1.0, "macro-f1": 1.0}
"""What is kept of the metrics, and the most that each can be; none is below zero."""
LONGEST_REASON = 600
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
    settings: RunSettings,
    server_round: int,
) -> Reply:
    member, wire_dtype = asked.member, settings.wire.dtype
    least_examples = settings.clients.min_examples  # believed when it was asked, held here
    allowed = TRAIN_RECORDS - (set() if _sends_head(asked, roster) else {"head"})
    content = open_reply(message, allowed, server_round, roster.base, member.data)
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
    num_examples = int(
        number(metrics(content), "num-examples", least_examples, MAX_EXAMPLES, is_whole=True)
    )
    numbers = read_metrics(content)
    return Reply(member, adapter, num_examples, numbers, len(packed) + head_bytes, head=head)


def _sends_head(asked: Asked, roster: Roster) -> bool:
    """Whether the task has a head, and it travels."""
    return bool(roster.head_shapes) and not asked.rule.keeps_head


def _admit_head(content: RecordDict, asked: Asked, roster: Roster) -> tuple[Head | None, int]:
    """The head of a reply and its bytes, where it sends one."""
    if not _sends_head(asked, roster):
        return None, 0
    packed = from_record(content.get("head"), limit=head_budget_bytes(roster.head_shapes))
    head = unpack_head(packed, roster.head_shapes)
    for name, values in head.items():
        check_size(name, largest(values))
    return head, len(packed)


def open_reply(
    message: Message, allowed: frozenset[str], server_round: int, base: str, data: str = ""
) -> RecordDict:
    """The content of a reply that belongs to this round, base and data; ReplyError otherwise.

    allowed: the records that may be in it.
    data: the hash that the client told when it was asked who it is; empty where it told none.
    """
    refuse_removed(message.metadata.src_node_id)
    content = records_of(message, allowed)
    told = config(content, "reply")
    _check_stamp(told, server_round, base, data)
    holdings(told)
    return content


def _check_stamp(told: Fields, server_round: int, base: str, data: str) -> None:
    came = told.get("round")
    if type(came) is not int or came != server_round:
        raise ReplyError(f"expected a reply to round {server_round}; got one to {shown(came)}")
    if told.get("base") != base:
        raise ReplyError(f"trained on base {shown(told.get('base'))}; the run's is {base!r}")
    if data and told.get("data") != data:
        raise ReplyError(
            f"its data changed since the run began (hash {shown(told.get('data'))}, before "
            f"{data!r}): bring them back, or begin a new run"
        )


def read_metrics(content: RecordDict) -> dict[str, float]:
    """The metrics that are kept, as plain numbers within their bounds."""
    told = metrics(content)
    counts = {n: number(told, n, 0, most, is_whole=True) for n, most in COUNTS.items() if n in told}
    return counts | {n: number(told, n, 0, most) for n, most in MEASURES.items() if n in told}


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
