"""Asking who is there: once before the run, and in every round those who came since."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from adapters.adapter import Adapter
from adapters.codec import budget_bytes, limits_of, unpack
from adapters.errors import AdapterError, BouquetError, UsageError, listing
from adapters.records import from_record
from server.mailbox import Mailbox
from server.roster import Member, Roster, roster_from_answers

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0
"""How long the start of a run waits for more clients than it needs."""


def call_roster(
    mailbox: Mailbox,
    at_least: int,
    timeout: float,
    base: str | None = None,
    data: Mapping[str, str] | None = None,
) -> Roster:
    """Ask every connected node; wait until `at_least` of them can take part.

    Nodes that are slower than the others by half a minute join in a later round.
    base: of a run that goes on; by default the base that most clients have is the run's.
    data: of a run that goes on, client -> hash of the data that it began with.
    Raises UsageError when too few connect, or nobody can take part, with their reasons.
    """
    began = time.monotonic()
    asked: set[int] = set()
    answers: list[Message] = []
    heard_enough_at: float | None = None
    while True:
        nodes = set(mailbox.node_ids())
        ask(mailbox, nodes - asked)
        asked |= nodes
        answers += mailbox.answers()
        now = time.monotonic()
        if len(answers) >= at_least:
            heard_enough_at = heard_enough_at or now
            if len(answers) == len(asked) or now - heard_enough_at > PATIENCE_SECONDS:
                return roster_from_answers(answers, base=base, data=data)
        if now - began > timeout:
            if len(nodes) < at_least:
                raise UsageError(
                    f"{len(nodes)} clients connected within {timeout:g} s; {at_least} needed"
                )
            return roster_from_answers(answers, base=base, data=data)
        time.sleep(POLL_SECONDS)


def ask(mailbox: Mailbox, nodes: Iterable[int]) -> None:
    """Send each of these nodes a query, whose answer comes when it comes."""
    mailbox.ask_later(_query(node, ConfigRecord()) for node in sorted(nodes))


class Attendance:
    """The roster of a run, kept up to date without ever waiting for a site that is silent."""

    def __init__(
        self, mailbox: Mailbox, roster: Roster, refuse: Callable[[Mapping[str, int]], None]
    ) -> None:
        """refuse: raises UsageError where the run's method cannot take these ranks together."""
        self._mailbox = mailbox
        self._refuse = refuse
        self._asked = {member.node_id for member in roster.members}
        self.roster = roster

    def update(self) -> list[Member]:
        """Take in who has answered since, ask who is new, and return the members connected now."""
        answers = self._mailbox.answers()
        if answers:
            self.roster = self._admit(roster_from_answers(answers, self.roster))
        nodes = set(self._mailbox.node_ids())
        ask(self._mailbox, nodes - self._asked)
        self._asked = nodes  # who goes and comes back is asked again
        return self.roster.present(nodes)

    def _admit(self, after: Roster) -> Roster:
        """The roster without those whose rank the method cannot take beside the others'."""
        before = self.roster.ranks
        kept, left_out = [], dict(after.left_out)
        for member in after.members:
            try:
                if before.get(member.name) != member.rank:
                    self._refuse({**before, member.name: member.rank})
                kept.append(member)
            except UsageError as error:
                left_out[member.name] = str(error)
        return replace(after, members=kept, left_out=left_out)

    def ask_again(self, members: Iterable[Member]) -> None:
        """Who answered badly may have changed: its rank, its base, what it holds."""
        ask(self._mailbox, {member.node_id for member in members})

    def note_holdings(self, node: int, held: frozenset[str]) -> None:
        """Take in which pieces of merged this client has just said that it has."""
        members = [
            replace(member, holds=held) if member.node_id == node else member
            for member in self.roster.members
        ]
        self.roster = replace(self.roster, members=members)

    def current(self, member: Member) -> Member:
        """The same client as the roster has it now."""
        return next((m for m in self.roster.members if m.node_id == member.node_id), member)


def ask_principal(mailbox: Mailbox, roster: Roster, rank: int, timeout: float) -> Adapter:
    """The leading singular directions of the base weights, from the first client that answers well.

    Every client has the same base, so any of them can decompose it. Raises BouquetError when none
    of them does.
    """
    reasons = []
    for member in roster.members:
        message = _query(member.node_id, ConfigRecord({"principal-rank": rank}))
        limit = budget_bytes(roster.shapes, rank)
        for answer in mailbox.exchange([message], timeout, {member.node_id: limit}):
            try:
                packed = from_record(answer.content.get("principal"), limit=limit)
                found = unpack(packed, limits=limits_of(roster.shapes, rank))
                if found.shapes != dict(roster.shapes) or found.rank > rank:
                    raise AdapterError("its modules or rank are not what was asked for")
            except (AdapterError, ValueError) as error:
                reasons.append(f"{member.name}: {error}")
            else:
                return found
    raise BouquetError(f"no client could decompose the base model: {listing(reasons, limit=3)}")


def _query(node: int, ask: ConfigRecord) -> Message:
    return Message(RecordDict({"ask": ask}), dst_node_id=node, message_type=MessageType.QUERY)
