"""Who can take part: what each node says of itself, and whether it fits the others."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from flwr.app import Message, RecordDict

from adapters.errors import ReplyError, UsageError, listing
from server.answer import (
    QUERY_RECORDS,
    Fields,
    config,
    failure_of,
    records_of,
    text,
    texts,
    whole,
    wholes,
)
from server.names import registered_names, true_name
from settings.keys import as_list, listed
from settings.labels import canonical_label
from settings.site import NAME
from settings.units import counted


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
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its classes."""
    holds: frozenset[str] = frozenset()
    """The pieces of merged that it has, by version."""
    data: str = ""
    """Hash of the data that it trains on; empty where it did not say."""
    template: str = ""
    """Hash of the file with a chat template that it was told to use; empty: the base's own."""


LONGEST_LABEL = 1000
LONGEST_NAME = 40
LONGEST_BASE = 80
HASH = r"[0-9a-f]{0,64}"
MAX_EXAMPLES = 10**9
MAX_NUMBER = 10**9
MOST_MODULES = 100_000
LONGEST_MODULE = 500
LONGEST_SIDE = 10**7
MOST_HEADS = 64
HEAD_SHAPE = r"[1-9][0-9]{0,7}(x[1-9][0-9]{0,7}){0,3}"
MOST_HEAD_VALUES = 10**10
MOST_PIECES = 100_000


class Kind(NamedTuple):
    """What all members of a run agree in."""

    base: str
    shapes: tuple[tuple[str, int, int], ...]
    head: tuple[tuple[str, tuple[int, ...]], ...]
    labels: tuple[str, ...]
    template: str
    """Hash of the file with a chat template; empty where there is none."""


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

    @property
    def ranks(self) -> dict[str, int]:
        """Client -> rank."""
        return {member.name: member.rank for member in self.members}

    def present(self, nodes: Collection[int]) -> list[Member]:
        """The members among these nodes, in roster order."""
        return [member for member in self.members if member.node_id in nodes]


def roster_from_answers(
    answers: Iterable[Message],
    known: Roster | None = None,
    base: str | None = None,
    data: Mapping[str, str] | None = None,
    min_examples: int = 1,
) -> Roster:
    """The roster that these answers to `query` make, sorted by number and name.

    The base that most clients have is the run's, unless `base` names it.
    known: who took part before; a node that answers again replaces what it said then, and the
    run's base stays what it was.
    data: client -> hash of the data that it began the run with; one whose data have changed since
    is left out.
    min_examples: who has fewer does not take part.
    Raises UsageError when nobody can take part, with their reasons.
    """
    found, left_out = _read(answers, known)
    for member in [member for member in found if member.num_examples < min_examples]:
        found.remove(member)
        left_out[member.name] = (
            f"has {counted(member.num_examples, 'training example')}; clients.min-examples is "
            f"{min_examples}"
        )
    if known is None:
        agreed = _most_common([member for member in found if base in (None, member.base)])
        found = _distinct_names(found)
    else:
        agreed = _kind_of_run(known)
        found = _joined(known.members, found)
    members = []
    began = dict(known.data if known else data or {})
    for member in sorted(found, key=_order):
        before = began.get(member.name, "")
        if before and member.data and member.data != before:
            left_out[member.name] = (
                f"its data have changed since the run began (hash {member.data}, before {before}): "
                "bring them back, or begin a new run"
            )
        elif agreed and _kind(member) == agreed:
            members.append(member)
            began[member.name] = before or member.data
        elif agreed and _kind(member)._replace(template=agreed.template) == agreed:
            left_out[member.name] = (
                f"has another chat template ({_template(member.template)}, the run's is "
                f"{_template(agreed.template)}): data.chat-template-file must hold the same at "
                "every site"
            )
        elif agreed and _kind(member)[:2] == agreed[:2]:
            left_out[member.name] = "has another classification head: data.labels must be the same"
        else:
            wanted = agreed.base if agreed else base
            left_out[member.name] = f"has base model {member.base}, the run's is {wanted}"
    if agreed is None or not (members or known):
        reasons = listing(f"{name}: {why}" for name, why in left_out.items())
        raise UsageError(f"no client can take part: {reasons or 'no node is connected'}")
    return Roster(
        members,
        agreed.base,
        {name: (m, n) for name, m, n in agreed.shapes},
        left_out,
        head_shapes=dict(agreed.head),
        data=began,
        labels=agreed.labels,
        template=agreed.template,
    )


def _read(answers: Iterable[Message], known: Roster | None) -> tuple[list[Member], dict[str, str]]:
    """The members that these answers describe, and who is left out with them."""
    names = {member.node_id: member.name for member in known.members} if known else {}
    found: list[Member] = []
    left_out = dict(known.left_out) if known else {}
    for answer in answers:
        node = answer.metadata.src_node_id
        own = {f"node {node}", names.get(node)}
        left_out = {
            n: why for n, why in left_out.items() if n not in own and not n.endswith(f"@{node}")
        }
        try:
            found.append(_member(answer))
            left_out.pop(found[-1].name, None)
        except ReplyError as error:
            before = " (what it said before stands)" if node in names else ""
            left_out[names.get(node) or _claimed_name(answer)] = f"{error}{before}"
    return found, left_out


def _claimed_name(answer: Message) -> str:
    """What to call a node that does not take part; the name beside a failure is its word alone."""
    node = answer.metadata.src_node_id
    if registered := (registered_names() or {}).get(node):
        return registered
    content = answer.content if answer.has_content() else RecordDict()
    claimed = failure_of(content).get("client", "") if "failure" in content else ""
    is_name = re.fullmatch(NAME, claimed) and len(claimed) <= LONGEST_NAME
    return f"{claimed}@{node}" if is_name else f"node {node}"


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


def _kind(member: Member) -> Kind:
    return Kind(member.base, member.shapes, member.head_shapes, member.labels, member.template)


def _template(template: str) -> str:
    return f"hash {template}" if template else "no file"


def _kind_of_run(roster: Roster) -> Kind:
    shapes = tuple(sorted((name, m, n) for name, (m, n) in roster.shapes.items()))
    head = tuple(sorted(roster.head_shapes.items()))
    return Kind(roster.base, shapes, head, roster.labels, roster.template)


def _most_common(members: list[Member]) -> Kind | None:
    kinds = Counter(_kind(member) for member in sorted(members, key=_order))
    return kinds.most_common(1)[0][0] if kinds else None


def _order(member: Member) -> tuple[int, str, int]:
    return member.number, member.name, member.node_id


def _member(answer: Message) -> Member:
    node = answer.metadata.src_node_id
    site = config(records_of(answer, QUERY_RECORDS), "site")
    shapes = _shapes(site)
    head_shapes = _head_shapes(site)
    smallest = min((min(m, n) for _, m, n in shapes), default=0)
    if not smallest:
        raise ReplyError("it names no module that it would train")
    rank = whole(site, "rank", 1, LONGEST_SIDE)
    if rank > smallest:
        raise ReplyError(f"rank {rank} does not fit modules of smallest side {smallest}")
    return Member(
        name=true_name(node, text(site, "client", LONGEST_NAME, NAME)),
        number=whole(site, "number", 0, MAX_NUMBER),
        node_id=node,
        rank=rank,
        num_examples=whole(site, "num-examples", 0, MAX_EXAMPLES),
        base=text(site, "base", LONGEST_BASE),
        shapes=shapes,
        head_shapes=head_shapes,
        labels=_labels(site, max((shape[0] for _, shape in head_shapes), default=0)),
        holds=holdings(site),
        data=text({"data": "", **site}, "data", 64, HASH),
        template=text({"chat-template": "", **site}, "chat-template", 64, HASH),
    )


def _shapes(site: Fields) -> tuple[tuple[str, int, int], ...]:
    """(module, m, n) of each module, sorted."""
    modules = _names(site, "modules", MOST_MODULES)
    sides = [wholes(site, key, MOST_MODULES, 1, LONGEST_SIDE) for key in ("rows", "columns")]
    if any(len(side) != len(modules) for side in sides):
        counts = listing(f"{len(side):,}" for side in sides)
        raise ReplyError(f"it names {len(modules):,} modules, and rows and columns of {counts}")
    return tuple(sorted(zip(modules, *sides, strict=True)))


def _head_shapes(site: Fields) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of each array of a head, sorted."""
    names = _names(site, "head", MOST_HEADS)
    told = texts(site, "head-shapes", MOST_HEADS, 40, HEAD_SHAPE)
    if len(told) != len(names):
        raise ReplyError(f"it names {len(names)} arrays of a head, and {len(told)} shapes")
    shapes = [tuple(map(int, shape.split("x"))) for shape in told]
    if sum(map(prod, shapes)) > MOST_HEAD_VALUES:
        raise ReplyError(f"its head has more than {MOST_HEAD_VALUES:,} values")
    return tuple(sorted(zip(names, shapes, strict=True)))


def _names(site: Fields, key: str, most: int) -> list[str]:
    names = texts(site, key, most, LONGEST_MODULE)
    if len(set(names)) < len(names):
        raise ReplyError(f"each of {key} must be there once; it names one twice")
    return names


def _labels(site: Fields, most: int) -> tuple[str, ...]:
    """These labels where a key can hold them, at most so many; a site that sends others lies."""
    value = site.get("labels", [])
    if not isinstance(value, list) or len(value) > most:
        raise ReplyError(f"its labels are no list of at most {most}")
    if not all(isinstance(label, str) and len(label) <= LONGEST_LABEL for label in value):
        raise ReplyError(f"its labels are not texts of at most {LONGEST_LABEL} characters")
    held = tuple(canonical_label(label) for label in listed(as_list(value)))
    if held != tuple(value) or len(value) == 1 or "" in value or len(set(value)) < len(value):
        raise ReplyError("its labels are not at least two, each once and none empty")
    return held


def holdings(record: Fields) -> frozenset[str]:
    """The pieces that a client says it has, by version."""
    return frozenset(texts({"holds": [], **record}, "holds", MOST_PIECES, 64, HASH))


def _distinct_names(members: list[Member]) -> list[Member]:
    """Clients that share a name are told apart by their node."""
    times = Counter(member.name for member in members)
    return [
        replace(member, name=f"{member.name}@{member.node_id}")
        if times[member.name] > 1
        else member
        for member in members
    ]
