"""Asking who is there: once before the run, and in every round those who came since."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from adapters.adapter import Adapter, largest
from adapters.codec import budget_bytes, limits_of, unpack
from adapters.errors import AdapterError, BouquetError, ReplyError, UsageError, listing, quoted
from adapters.records import from_record
from server.answer import PRINCIPAL_RECORDS, records_of
from server.exchange import check_size
from server.mailbox import Mailbox
from server.names import name_of_node, registered_names
from server.roster import Member, Roster, roster_from_answers
from server.waiting import Waiting

POLL_SECONDS = 0.5
AGAIN_SECONDS = 60.0
"""Who does not say who it is for so long is asked again: a first start may take a minute."""
PATIENCE_SECONDS = 30.0
"""How long the start of a run waits for more clients than it needs."""


def call_roster(
    mailbox: Mailbox,
    at_least: int,
    timeout: float,
    base: str | None = None,
    data: Mapping[str, str] | None = None,
    tell: Callable[[Waiting], None] = lambda waiting: None,
    min_examples: int = 1,
) -> Roster:
    """Ask every connected node; wait until `at_least` of them can take part.

    Nodes that are slower than the others by half a minute join in a later round.
    base: of a run that goes on; by default the base that most clients have is the run's.
    data: of a run that goes on, client -> hash of the data that it began with.
    Raises UsageError when too few connect, or nobody can take part, with their reasons.
    """
    began = time.monotonic()
    asked = Asking(mailbox)
    answers: dict[int, Message] = {}
    heard_enough_at: float | None = None
    while True:
        nodes = set(mailbox.node_ids())
        asked.ask(nodes - answers.keys())
        answers |= {answer.metadata.src_node_id: answer for answer in mailbox.answers()}
        now = time.monotonic()
        if len(answers) >= at_least:
            heard_enough_at = heard_enough_at or now
            if answers.keys() >= nodes or now - heard_enough_at > PATIENCE_SECONDS:
                break
        if now - began > timeout:
            if len(nodes) < at_least:
                raise UsageError(
                    f"{len(nodes)} clients connected within {timeout:g} s; {at_least} needed"
                )
            break
        silent = nodes - answers.keys()
        left = began + timeout - now
        if heard_enough_at is not None:
            left = min(left, heard_enough_at + PATIENCE_SECONDS - now)
        tell(
            Waiting(
                "answers of sites",
                tuple(sorted(_name_of(answer) for answer in answers.values())),
                tuple(name_of_node(node) for node in sorted(silent)),
                max(0, at_least - len(nodes)),
                now - began,
                left,
                tuple(name_of_node(node) for node in sorted(silent & asked.again)),
            )
        )
        time.sleep(POLL_SECONDS)
    return roster_from_answers(answers.values(), base=base, data=data, min_examples=min_examples)


def _name_of(answer: Message) -> str:
    """What a site is registered as, or else calls itself."""
    registered = name_of_node(answer.metadata.src_node_id)
    site = answer.content.get("site") if answer.has_content() else None
    claimed = site.get("client") if isinstance(site, ConfigRecord) else None
    is_registered = registered_names() is not None
    return quoted(claimed, 80) if isinstance(claimed, str) and not is_registered else registered


class Asking:
    """Asks nodes who they are, and those that stay silent again: after a minute, two, four."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._next: dict[int, float] = {}
        self._times: Counter[int] = Counter()
        self.again: set[int] = set()
        """Who was asked more than once."""

    def ask(self, silent: Collection[int]) -> None:
        """Ask who of these was not asked yet, or long ago; forget all others."""
        now = time.monotonic()
        due = [node for node in sorted(silent) if now >= self._next.get(node, 0.0)]
        self.forget(self._next.keys() - silent)
        ask(self._mailbox, due)
        for node in due:
            self._next[node] = now + AGAIN_SECONDS * 2.0 ** self._times[node]
            self._times[node] += 1
        self.again |= {node for node in due if self._times[node] > 1}

    def forget(self, nodes: Iterable[int]) -> None:
        """These have answered, or gone; should they be asked again, it is for the first time."""
        for node in list(nodes):
            self._next.pop(node, None)
            self._times.pop(node, None)
            self.again.discard(node)


def ask(mailbox: Mailbox, nodes: Iterable[int]) -> None:
    """Send each of these nodes a query, whose answer comes when it comes."""
    mailbox.ask_later(_query(node, ConfigRecord()) for node in sorted(nodes))


class Attendance:
    """The roster of a run, kept up to date without ever waiting for a site that is silent."""

    def __init__(
        self,
        mailbox: Mailbox,
        roster: Roster,
        refuse: Callable[[Mapping[str, int]], None],
        min_examples: int = 1,
    ) -> None:
        """refuse: raises UsageError where the run's method cannot take these ranks together."""
        self._mailbox = mailbox
        self._refuse = refuse
        self._min_examples = min_examples
        self._known = {member.node_id for member in roster.members}
        self._asking = Asking(mailbox)
        self._registered = registered_names()
        self.roster = roster

    def update(self) -> list[Member]:
        """Take in who has answered since, ask who is new, and return the members connected now."""
        answers = self._mailbox.answers()
        self._known |= {answer.metadata.src_node_id for answer in answers}
        if answers:
            after = roster_from_answers(answers, self.roster, min_examples=self._min_examples)
            self.roster = self._admit(after)
        nodes = set(self._mailbox.node_ids())
        self._known &= nodes  # who goes and comes back is asked again
        if (registered := registered_names()) != self._registered:
            self._registered = registered  # who was left out may be registered now
            self._known &= {member.node_id for member in self.roster.members}
        self._asking.ask(nodes - self._known)
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
                content = records_of(answer, PRINCIPAL_RECORDS)
                packed = from_record(content.get("principal"), limit=limit)
                found = unpack(packed, limits=limits_of(roster.shapes, rank))
                if found.shapes != dict(roster.shapes) or found.rank > rank:
                    raise AdapterError("its modules or rank are not what was asked for")
                for name, factors in found.items():
                    check_size(name, max(largest(factors.a), largest(factors.b)))
            except (AdapterError, ReplyError) as error:
                reasons.append(quoted(f"{member.name}: {error}"))
            else:
                return found
    raise BouquetError(f"no client could decompose the base model: {listing(reasons, limit=3)}")


def _query(node: int, ask: ConfigRecord) -> Message:
    return Message(RecordDict({"ask": ask}), dst_node_id=node, message_type=MessageType.QUERY)
