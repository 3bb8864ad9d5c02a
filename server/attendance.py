"""Asking who is there: once before the run, and in every round those who came since."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace

from flwr.app import Message, MessageType

from adapters.adapter import Adapter, largest
from core.errors import AdapterError, BouquetError, ReplyError, UsageError, listing, quoted
from core.units import counted
from server.admission import check_size
from server.mailbox import Look, Mailbox
from server.member import Member
from server.names import name_of_node, registered_names
from server.roster import Kind, NoRosterError, Roster, Rules, Told, roster_after
from server.waiting import INTRODUCTIONS, Waiting
from wire.codec import budget_bytes, limits_of, unpack
from wire.messages import PRINCIPAL_RECORDS, Query, records_of
from wire.records import from_record

POLL_SECONDS = 0.5
AGAIN_SECONDS = 60.0
"""Who does not say who it is for so long is asked again: a first start may take a minute."""
NEXT_SECONDS = 60.0
"""Who is asked to decompose the base and is silent for so long is not waited for alone."""
PATIENCE_SECONDS = 30.0
"""How long the start of a run waits for more clients than it needs."""


def call_roster(
    mailbox: Mailbox,
    at_least: int,
    timeout: float,
    agreed: Kind | None = None,
    data: Mapping[str, str] | None = None,
    tell: Callable[[Waiting], None] = lambda waiting: None,
    rules: Rules | None = None,
) -> Roster:
    """Ask every connected node; wait until `at_least` of them can take part.

    Nodes that are slower than the others by half a minute join in a later round. Who cannot take
    part does not count, and ends no wait for others.
    agreed, data: of a run that goes on; rules: server/roster.py.
    Raises UsageError when too few can take part by the deadline, with the reasons of the others.
    """
    began = time.monotonic()
    asked, told = Asking(mailbox), Told()
    heard: set[int] = set()
    roster: Roster | None = None
    nobody: UsageError | None = None
    left_out: Mapping[str, str] = {}
    heard_enough_at: float | None = None
    while True:
        nodes = set(mailbox.node_ids())
        heard &= nodes  # who goes and comes back may have changed
        taking_part = {member.node_id for member in roster.members} if roster else set()
        asked.ask(nodes - (heard & taking_part))
        answers = mailbox.answers()
        for answer in answers:
            told.take(answer)
            heard.add(answer.metadata.src_node_id)
        if told.keep(nodes) or answers:
            try:
                roster, nobody = told.roster(agreed, data, rules), None
                left_out = roster.left_out
            except NoRosterError as error:
                roster, nobody, left_out = None, error, error.left_out
        members = [member.name for member in roster.members] if roster else []
        silent, now = nodes - heard, time.monotonic()
        heard_enough_at = (heard_enough_at or now) if len(members) >= at_least else None
        if roster and heard_enough_at is not None:
            if not silent or now - heard_enough_at > PATIENCE_SECONDS:
                return roster
        elif now - began > timeout or (mailbox.is_closed and nodes and not silent):
            raise nobody or _too_few(len(members), len(nodes), at_least, left_out, now - began)
        left = began + timeout - now
        if heard_enough_at is not None:
            left = heard_enough_at + PATIENCE_SECONDS - now
        tell(
            Waiting(
                INTRODUCTIONS,
                tuple(sorted(members)),
                tuple(name_of_node(node) for node in sorted(silent)),
                max(0, at_least - len(members) - len(silent)),
                now - began,
                left,
                tuple(name_of_node(node) for node in sorted(silent & asked.again)),
                left_out,
            )
        )
        time.sleep(POLL_SECONDS)


def _too_few(
    members: int, nodes: int, at_least: int, left_out: Mapping[str, str], seconds: float
) -> UsageError:
    if nodes < at_least:
        within = f"{counted(nodes, 'client')} connected within {seconds:.0f} s; {at_least} needed"
    else:
        within = f"{members} of {counted(nodes, 'client')} can take part; {at_least} needed"
    reasons = listing(f"{name}: {why}" for name, why in left_out.items())
    return UsageError(
        f"{within} (clients.min-replies){f'. Left out: {reasons}' if reasons else ''}"
    )


class Asking:
    """Asks nodes who they are, and again after a minute, two, four, as long as they are named.

    So it is with who stays silent, and with who cannot take part: its owner may mend that.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._next: dict[int, float] = {}
        self._times: Counter[int] = Counter()
        self.again: set[int] = set()
        """Who was asked more than once."""

    def ask(self, nodes: Set[int]) -> None:
        """Ask who of these was not asked yet, or long ago; forget all others."""
        now = time.monotonic()
        due = [node for node in sorted(nodes) if now >= self._next.get(node, 0.0)]
        self.forget(self._next.keys() - nodes)
        ask(self._mailbox, due)
        for node in due:
            self._next[node] = now + AGAIN_SECONDS * 2.0 ** self._times[node]
            self._times[node] += 1
        self.again |= {node for node in due if self._times[node] > 1}

    def forget(self, nodes: Iterable[int]) -> None:
        """These take part, or have gone; should they be asked again, it is for the first time."""
        for node in list(nodes):
            self._next.pop(node, None)
            self._times.pop(node, None)
            self.again.discard(node)


def ask(mailbox: Mailbox, nodes: Iterable[int]) -> None:
    """Send each of these nodes a query, whose answer comes when it comes."""
    mailbox.ask_later(_query(node) for node in sorted(nodes))


class Attendance:
    """The roster of a run, kept up to date without ever waiting for a site that is silent."""

    def __init__(self, mailbox: Mailbox, roster: Roster, rules: Rules | None = None) -> None:
        self._mailbox = mailbox
        self._rules = rules
        self._known = {member.node_id for member in roster.members}
        self._asking = Asking(mailbox)
        self._registered = registered_names()
        self.roster = roster

    def update(self) -> list[Member]:
        """Take in who has answered since, ask who is new, and return the members connected now."""
        answers = self._mailbox.answers()
        self._known |= {answer.metadata.src_node_id for answer in answers}
        registered = registered_names()
        has_changed, self._registered = registered != self._registered, registered
        if answers or has_changed:  # whose key was removed is a member no more
            self.roster = roster_after(answers, self.roster, self._rules)
        nodes = set(self._mailbox.node_ids())
        self._known &= nodes  # who goes and comes back is asked again
        if has_changed:  # who was left out may be registered now
            self._asking.forget(nodes)
        taking_part = {member.node_id for member in self.roster.members}
        self._asking.ask(nodes - (self._known & taking_part))
        return self.roster.present(nodes)

    def ask_again(self, members: Iterable[Member]) -> None:
        """Who answered badly may have changed: its rank, its base, what it holds."""
        ask(self._mailbox, {member.node_id for member in members})

    def note_holdings(self, node: int, held: frozenset[str]) -> None:
        """Take in which pieces of merged this client has just said that it has."""
        members = [
            member.holding(held) if member.node_id == node else member
            for member in self.roster.members
        ]
        self.roster = replace(self.roster, members=members)

    def current(self, member: Member) -> Member:
        """The same client as the roster has it now."""
        return next((m for m in self.roster.members if m.node_id == member.node_id), member)


def ask_principal(
    mailbox: Mailbox,
    roster: Roster,
    rank: int,
    timeout: float,
    look: Callable[[Look], None] = lambda look: None,
) -> Adapter:
    """The leading singular directions of the base weights, from the first client that answers well.

    Every client has the same base, so any of them can decompose it: one is asked, and the next
    where that fails, or is silent for a while. Raises BouquetError when none of them does.
    """
    names = {member.node_id: member.name for member in roster.members}
    messages = [_query(node, rank) for node in names]
    limit = budget_bytes(roster.shapes, rank)
    expected = min(rank, *(min(sides) for sides in roster.shapes.values()))
    reasons = dict.fromkeys(names.values(), f"no answer within {timeout:g} s")
    room = dict.fromkeys(names, limit)
    for answer in mailbox.exchange(messages, timeout, room, look, NEXT_SECONDS):
        name = names[answer.metadata.src_node_id]
        try:
            content = records_of(answer, PRINCIPAL_RECORDS)
            packed = from_record(content.get("principal"), limit=limit)
            found = unpack(packed, limits=limits_of(roster.shapes, rank))
            if found.shapes != dict(roster.shapes):
                raise AdapterError("its modules are not those of the run")
            if found.rank != expected:
                raise AdapterError(f"its rank is {found.rank}; {expected} was asked for")
            for module, factors in found.items():
                check_size(module, max(largest(factors.a), largest(factors.b)))
        except (AdapterError, ReplyError) as error:
            reasons[name] = quoted(error)
        else:
            return found
    told = listing((f"{name}: {why}" for name, why in reasons.items()), limit=3)
    raise BouquetError(f"no client could decompose the base model: {told}")


def _query(node: int, principal_rank: int = 0) -> Message:
    content = Query(principal_rank).to_records()
    return Message(content, dst_node_id=node, message_type=MessageType.QUERY)
