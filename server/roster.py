"""Who is there: each node is asked once for its name, rank, base model and module shapes."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from adapters.adapter import Adapter
from adapters.codec import budget_bytes, unpack
from adapters.errors import AdapterError, BouquetError, UsageError, listing
from adapters.records import from_record

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Member:
    """One client that can take part."""

    name: str
    number: int
    node_id: int
    rank: int
    num_examples: int
    base: str
    shapes: tuple[tuple[str, int, int], ...]
    """(module, m, n) for each module that it adapts."""
    head_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(name, shape) of what it trains beside them."""


@dataclass(frozen=True)
class Roster:
    """The clients that agree on the base model, in a fixed order, and those left out."""

    members: list[Member]
    base: str
    shapes: Mapping[str, tuple[int, int]]
    left_out: dict[str, str]
    """Client or node -> why it cannot take part."""
    head_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Client -> rank."""
        return {member.name: member.rank for member in self.members}


def call_roster(grid: Grid, at_least: int, timeout: float) -> Roster:
    """Ask every connected node; wait for `at_least` of them.

    The base that most clients have is the run's. Raises UsageError when nobody can take part, with
    their reasons.
    """
    deadline = time.monotonic() + timeout
    while len(nodes := sorted(grid.get_node_ids())) < at_least:
        if time.monotonic() > deadline:
            raise UsageError(
                f"{len(nodes)} clients connected within {timeout:g} s; {at_least} needed"
            )
        time.sleep(POLL_SECONDS)
    asked = [
        Message(
            RecordDict({"ask": ConfigRecord()}), dst_node_id=node, message_type=MessageType.QUERY
        )
        for node in nodes
    ]
    return roster_from_replies(grid.send_and_receive(asked, timeout=timeout))


def ask_principal(grid: Grid, roster: Roster, rank: int, timeout: float) -> Adapter:
    """The leading singular directions of the base weights, from the first client that answers well.

    Every client has the same base, so any of them can decompose it. Raises BouquetError when none
    of them does.
    """
    reasons = []
    for member in roster.members:
        message = Message(
            RecordDict({"ask": ConfigRecord({"principal-rank": rank})}),
            dst_node_id=member.node_id,
            message_type=MessageType.QUERY,
        )
        for reply in grid.send_and_receive([message], timeout=timeout):
            try:
                limit = budget_bytes(roster.shapes, rank)
                found = unpack(from_record(reply.content.get("principal"), limit=limit))
                if found.shapes != dict(roster.shapes) or found.rank > rank:
                    raise AdapterError("its modules or rank are not what was asked for")
            except (AdapterError, ValueError) as error:
                reasons.append(f"{member.name}: {error}")
            else:
                return found
    raise BouquetError(f"no client could decompose the base model: {listing(reasons, limit=3)}")


def roster_from_replies(replies: Iterable[Message]) -> Roster:
    """The roster that these answers make: sorted by number and name, of one base model."""
    found: list[Member] = []
    left_out: dict[str, str] = {}
    for reply in replies:
        node = f"node {reply.metadata.src_node_id}"
        if reply.has_error():
            left_out[node] = f"failed to answer: {reply.error.reason}"
        elif "failure" in reply.content:
            failure = reply.content["failure"]
            left_out[str(failure.get("client", node))] = str(failure.get("reason"))
        else:
            try:
                found.append(_member(reply))
            except (KeyError, TypeError, ValueError) as error:
                left_out[node] = f"its answer cannot be read: {error!r}"
    if not found:
        reasons = listing(dict.fromkeys(left_out.values())) or "no node is connected"
        raise UsageError(f"no client can take part: {reasons}")
    base, shapes, head = Counter((m.base, m.shapes, m.head_shapes) for m in found).most_common(1)[
        0
    ][0]
    members = []
    for member in _distinct_names(sorted(found, key=lambda m: (m.number, m.name, m.node_id))):
        if (member.base, member.shapes, member.head_shapes) == (base, shapes, head):
            members.append(member)
        elif (member.base, member.shapes) == (base, shapes):
            left_out[member.name] = "has another classification head: data.labels must be the same"
        else:
            left_out[member.name] = f"has base model {member.base}, the run's is {base}"
    named_shapes = {name: (m, n) for name, m, n in shapes}
    return Roster(members, base, named_shapes, left_out, dict(head))


def _member(reply: Message) -> Member:
    site: Any = reply.content["site"]
    columns = zip(site["modules"], site["rows"], site["columns"], strict=True)
    heads = zip(site["head"], site["head-shapes"], strict=True)
    member = Member(
        name=str(site["client"])[:80],
        number=int(site["number"]),
        node_id=reply.metadata.src_node_id,
        rank=int(site["rank"]),
        num_examples=int(site["num-examples"]),
        base=str(site["base"])[:80],
        shapes=tuple(sorted((str(name), int(m), int(n)) for name, m, n in columns)),
        head_shapes=tuple(
            sorted((str(name), tuple(map(int, shape.split("x")))) for name, shape in heads)
        ),
    )
    smallest = min((min(m, n) for _, m, n in member.shapes), default=0)
    if not 1 <= member.rank <= smallest:
        raise ValueError(f"rank {member.rank} does not fit modules of smallest side {smallest}")
    return member


def _distinct_names(members: list[Member]) -> list[Member]:
    """Clients that share a name are told apart by their node."""
    times = Counter(member.name for member in members)
    return [
        replace(member, name=f"{member.name}@{member.node_id}")
        if times[member.name] > 1
        else member
        for member in members
    ]
