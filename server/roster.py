"""Who can take part: what the nodes say of themselves, and whether it fits together."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flwr.app import Message

from core.errors import ReplyError, UsageError, listing
from core.units import counted
from server.member import Member, claimed_name, member_of
from server.names import registered_names
from wire.site_card import LONGEST_SIDE


class Kind(NamedTuple):
    """What all members of a run agree in; None where that is open still, or need not be agreed."""

    base: str | None = None
    shapes: tuple[tuple[str, int, int], ...] | None = None
    head: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    labels: tuple[str, ...] | None = None
    template: str | None = None
    """Hash of the file with a chat template; empty where there is none."""
    rank: int | None = None
    """Where the method averages factors entry by entry."""


class Rules(NamedTuple):
    """Who may take part, whatever the others are."""

    min_examples: int = 1
    max_rank: int = LONGEST_SIDE
    one_rank: str = ""
    """Why the method needs the same rank of all; empty where it does not."""


@dataclass(frozen=True)
class Roster:
    """The clients that agree on the base model, in a fixed order, and those left out."""

    members: list[Member]
    base: str
    shapes: Mapping[str, tuple[int, int]]
    left_out: dict[str, str]
    """Client or node -> why it cannot take part."""
    head_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    """Client -> hash of the data that it began the run with."""
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its classes."""
    template: str = ""
    """Hash of the file with the chat template; empty: the base's own."""
    rank: int | None = None
    """Of all members, where the method needs the same of all."""

    @property
    def ranks(self) -> dict[str, int]:
        """Client -> rank."""
        return {member.name: member.rank for member in self.members}

    @property
    def kind(self) -> Kind:
        """What its members agree in."""
        shapes = tuple(sorted((name, m, n) for name, (m, n) in self.shapes.items()))
        head = tuple(sorted(self.head_shapes.items()))
        return Kind(self.base, shapes, head, self.labels, self.template, self.rank)

    def present(self, nodes: Collection[int]) -> list[Member]:
        """The members among these nodes, in roster order."""
        return [member for member in self.members if member.node_id in nodes]


class NoRosterError(UsageError):
    """Of those who have answered, nobody can take part; who comes later may."""

    def __init__(self, words: str, left_out: Mapping[str, str]) -> None:
        super().__init__(words)
        self.left_out = dict(left_out)


class Told:
    """What nodes have said of themselves before a run, the last word of each."""

    def __init__(self, answers: Iterable[Message] = ()) -> None:
        self._members: dict[int, Member] = {}
        self._odd: dict[int, tuple[str, str]] = {}
        for answer in answers:
            self.take(answer)

    def take(self, answer: Message) -> None:
        """Read an answer to `query`; one that makes no sense leaves its node out."""
        node = answer.metadata.src_node_id
        self._members.pop(node, None)
        self._odd.pop(node, None)
        try:
            self._members[node] = member_of(answer)
        except ReplyError as error:
            self._odd[node] = claimed_name(answer), str(error)

    def keep(self, nodes: Set[int]) -> bool:
        """Forget who is connected no more, or registered no more; whether that was anybody."""
        registered = registered_names()
        gone = (self._members.keys() | self._odd.keys()) - nodes
        if registered is not None:
            gone |= self._members.keys() - registered.keys()
        for node in gone:
            self._members.pop(node, None)
            self._odd.pop(node, None)
        return bool(gone)

    def roster(
        self,
        agreed: Kind | None = None,
        data: Mapping[str, str] | None = None,
        rules: Rules | None = None,
    ) -> Roster:
        """Who can take part, sorted by number and name.

        agreed: of a run that goes on. What is not agreed is as most clients have it.
        data: of a run that goes on, client -> hash of the data that it began with; one whose data
        have changed since is left out.
        Raises NoRosterError where nobody can take part, or as many clients are of one kind as of
        another, with their reasons.
        """
        agreed, rules, data = agreed or Kind(), rules or Rules(), data or {}
        found, odd = _distinct_names(list(self._members.values())), dict(self._odd.values())
        fit = [member for member in found if not _why_not(member, agreed, data, rules)]
        if not fit:
            left_out = odd | {m.name: _why_not(m, agreed, data, rules) for m in found}
            reasons = listing(f"{name}: {why}" for name, why in left_out.items())
            words = f"no client can take part: {reasons or 'no node is connected'}"
            raise NoRosterError(words, left_out)
        return _roster(found, odd, _most_common(fit, rules, odd), data, rules)


def roster_after(answers: Iterable[Message], known: Roster, rules: Rules | None = None) -> Roster:
    """The roster of a run that is under way, after these answers.

    A node that answers again replaces what it said before; what was agreed stays what it was.
    """
    names = {member.node_id: member.name for member in known.members}
    found: list[Member] = []
    left_out = dict(known.left_out)
    for answer in answers:
        node = answer.metadata.src_node_id
        own = {f"node {node}", names.get(node)}
        left_out = {
            n: why for n, why in left_out.items() if n not in own and not n.endswith(f"@{node}")
        }
        try:
            found.append(member_of(answer))
            left_out.pop(found[-1].name, None)
        except ReplyError as error:
            before = " (what it said before stands)" if node in names else ""
            left_out[names.get(node) or claimed_name(answer)] = f"{error}{before}"
    members = _joined(known.members, found)
    return _roster(members, left_out, known.kind, known.data, rules or Rules())


def _roster(
    found: list[Member],
    left_out: Mapping[str, str],
    kind: Kind,
    data: Mapping[str, str],
    rules: Rules,
) -> Roster:
    members, left_out, began = [], dict(left_out), dict(data)
    for member in sorted(found, key=_order):
        if why := _why_not(member, kind, data, rules):
            left_out[member.name] = why
        else:
            members.append(member)
            began[member.name] = began.get(member.name) or member.card.data
    return Roster(
        members,
        kind.base or "",
        {name: (m, n) for name, m, n in kind.shapes or ()},
        left_out,
        head_shapes=dict(kind.head or ()),
        data=began,
        labels=kind.labels or (),
        template=kind.template or "",
        rank=kind.rank,
    )


def _why_not(member: Member, kind: Kind, data: Mapping[str, str], rules: Rules) -> str:
    """Why this client cannot take part; empty where it can."""
    if member.num_examples < rules.min_examples:
        has = counted(member.num_examples, "training example")
        return f"has {has}; clients.min-examples is {rules.min_examples}"
    if member.rank > rules.max_rank:
        return f"trains rank {member.rank}; clients.max-rank is {rules.max_rank}"
    before, now = data.get(member.name, ""), member.card.data
    if before and now and now != before:
        return (
            f"its data have changed since the run began (hash {now}, before {before}): "
            "bring them back, or begin a new run"
        )
    return _difference(member, kind, rules)


def _difference(member: Member, kind: Kind, rules: Rules) -> str:
    """In what it is of another kind than the run; empty where it is of the same."""
    its = _kind(member, rules)
    where = [name for name in kind._fields if getattr(kind, name) not in (None, getattr(its, name))]
    if not where:
        return ""
    return {
        "base": f"has base model {its.base}, the run's is {kind.base}",
        "shapes": "adapts other modules than the run, or of other sizes: "
        f"{_odd_modules(its, kind)}. Base and lora.target-modules must be the same at every site",
        "head": "has another classification head: data.labels must be the same",
        "labels": "has another classification head: data.labels must be the same",
        "template": f"has another chat template ({_template(its.template)}, the run's is "
        f"{_template(kind.template)}): data.chat-template-file must hold the same at every site",
        "rank": f"trains rank {its.rank}, the run's is {kind.rank}: {rules.one_rank}",
    }[where[0]]


def _odd_modules(one: Kind, other: Kind) -> str:
    odd = sorted(set(one.shapes or ()) ^ set(other.shapes or ()))
    return listing((f"{name} {m} x {n}" for name, m, n in odd), limit=3)


def _joined(known: list[Member], newcomers: list[Member]) -> list[Member]:
    """Known members and newcomers; a node keeps its name, and nobody takes another's."""
    registered = registered_names()
    members = {
        member.node_id: member
        for member in known
        if registered is None or member.node_id in registered  # its key may be revoked by now
    }
    for new in sorted(newcomers, key=_order):
        taken = {member.name for node, member in members.items() if node != new.node_id}
        if new.node_id in members:
            name = members[new.node_id].name
        else:
            name = f"{new.name}@{new.node_id}" if new.name in taken else new.name
        members[new.node_id] = replace(new, name=name)
    return list(members.values())


def _kind(member: Member, rules: Rules) -> Kind:
    card, rank = member.card, member.rank if rules.one_rank else None
    return Kind(card.base, card.shapes, card.head_shapes, card.labels, card.template, rank)


def _template(template: str | None) -> str:
    return f"hash {template}" if template else "no file"


def _most_common(members: list[Member], rules: Rules, odd: Mapping[str, str]) -> Kind:
    """The kind of more members than are of any other; NoRosterError where there is none."""
    kinds: dict[Kind, list[str]] = {}
    for member in sorted(members, key=_order):
        kinds.setdefault(_kind(member, rules), []).append(member.name)
    most = max(map(len, kinds.values()))
    tied = {kind: names for kind, names in kinds.items() if len(names) == most}
    first, *others = tied
    if others:
        what = _first_difference(first, others[0])
        in_tie = {
            name: f"{_shown(kind, what)}: as many sites have another"
            for kind, names in tied.items()
            for name in names
        }
        raise NoRosterError(_tie(tied, what, rules), {**odd, **in_tie})
    return first


def _first_difference(one: Kind, other: Kind) -> str:
    return next(name for name in one._fields if getattr(one, name) != getattr(other, name))


def _tie(tied: Mapping[Kind, list[str]], what: str, rules: Rules) -> str:
    """Why none of these kinds can be the run's."""
    one, other, *_ = tied
    sides = listing(
        (f"{_shown(kind, what)}: {listing(names)}" for kind, names in tied.items()), limit=3
    )
    differ = f" (they differ in {_odd_modules(one, other)})" if what == "shapes" else ""
    why = rules.one_rank if what == "rank" else "all sites of a run must agree"
    return (
        f"no client can take part: {counted(len(tied), 'kind')} of sites are as many as each "
        f"other, and {why}. {sides}{differ}. Bring them in line, or take out who does not belong"
    )


def _shown(kind: Kind, what: str) -> str:
    """What a kind has where it differs from another."""
    return {
        "base": f"base model {kind.base}",
        "shapes": f"{counted(len(kind.shapes or ()), 'module')} to adapt",
        "head": f"a head of {listing(f'{name} {shape}' for name, shape in kind.head or ())}",
        "labels": f"labels {listing(kind.labels or ())}",
        "template": f"chat template {_template(kind.template)}",
        "rank": f"rank {kind.rank}",
    }[what]


def _order(member: Member) -> tuple[int, str, int]:
    return member.card.number, member.name, member.node_id


def _distinct_names(members: list[Member]) -> list[Member]:
    """Clients that share a name are told apart by their node."""
    times = Counter(member.name for member in members)
    return [
        replace(member, name=f"{member.name}@{member.node_id}")
        if times[member.name] > 1
        else member
        for member in members
    ]
