"""Who can take part: what each node says of itself, and whether it fits the others."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message

from adapters.errors import UsageError, listing, quoted
from settings.keys import as_list, listed
from settings.labels import canonical_label


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
) -> Roster:
    """The roster that these answers to `query` make, sorted by number and name.

    The base that most clients have is the run's, unless `base` names it.
    known: who took part before; a node that answers again replaces what it said then, and the
    run's base stays what it was.
    data: client -> hash of the data that it began the run with; one whose data have changed since
    is left out.
    Raises UsageError when nobody can take part, with their reasons.
    """
    found, left_out = _read(answers, known.left_out if known else {})
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


def _read(
    answers: Iterable[Message], left_out: Mapping[str, str]
) -> tuple[list[Member], dict[str, str]]:
    """The members that these answers describe, and who is left out with them."""
    found, still_out = [], dict(left_out)
    for answer in answers:
        node = f"node {answer.metadata.src_node_id}"
        still_out.pop(node, None)
        if answer.has_error():
            still_out[node] = quoted(f"failed to answer: {answer.error.reason}")
        elif "failure" in answer.content:
            failure = answer.content["failure"]
            name = quoted(failure.get("client", node), 80)
            still_out[name] = quoted(failure.get("reason"))
        else:
            try:
                found.append(_member(answer))
            except (KeyError, TypeError, ValueError) as error:
                still_out[node] = quoted(f"its answer cannot be read: {error!r}")
            else:
                still_out.pop(found[-1].name, None)
    return found, still_out


def _joined(known: list[Member], newcomers: list[Member]) -> list[Member]:
    """Known members and newcomers; a node keeps its name, and nobody takes another's."""
    members = {member.node_id: member for member in known}
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
    site: Any = answer.content["site"]
    columns = zip(site["modules"], site["rows"], site["columns"], strict=True)
    heads = zip(site["head"], site["head-shapes"], strict=True)
    head_shapes = tuple(
        sorted((str(name), tuple(map(int, shape.split("x")))) for name, shape in heads)
    )
    member = Member(
        name=quoted(site["client"], 80),
        number=int(site["number"]),
        node_id=answer.metadata.src_node_id,
        rank=int(site["rank"]),
        num_examples=int(site["num-examples"]),
        base=quoted(site["base"], 80),
        shapes=tuple(sorted((str(name), int(m), int(n)) for name, m, n in columns)),
        head_shapes=head_shapes,
        labels=_labels(
            site.get("labels", []), max((shape[0] for _, shape in head_shapes), default=0)
        ),
        holds=holdings(site),
        data=_hash(site.get("data", ""), "its data"),
        template=_hash(site.get("chat-template", ""), "its chat template"),
    )
    smallest = min((min(m, n) for _, m, n in member.shapes), default=0)
    if not 1 <= member.rank <= smallest:
        raise ValueError(f"rank {member.rank} does not fit modules of smallest side {smallest}")
    return member


def _hash(value: object, of: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{0,64}", value):
        raise ValueError(f"the hash of {of} is none")
    return value


def _labels(value: object, most: int) -> tuple[str, ...]:
    """These labels where a key can hold them, at most so many; a site that sends others lies."""
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"its labels are no list of at most {most}")
    if not all(isinstance(label, str) and len(label) <= LONGEST_LABEL for label in value):
        raise ValueError(f"its labels are not texts of at most {LONGEST_LABEL} characters")
    held = tuple(canonical_label(label) for label in listed(as_list(value)))
    if held != tuple(value) or len(value) == 1 or "" in value or len(set(value)) < len(value):
        raise ValueError("its labels are not at least two, each once and none empty")
    return held


def holdings(record: object) -> frozenset[str]:
    """The pieces that a client says it has; none where it says nothing that can be read."""
    held = record.get("holds", []) if isinstance(record, ConfigRecord) else []
    return frozenset(map(str, held)) if isinstance(held, list) else frozenset()


def _distinct_names(members: list[Member]) -> list[Member]:
    """Clients that share a name are told apart by their node."""
    times = Counter(member.name for member in members)
    return [
        replace(member, name=f"{member.name}@{member.node_id}")
        if times[member.name] > 1
        else member
        for member in members
    ]
