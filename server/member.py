"""One client as it describes itself: its answer to a query, read strictly.

Every size in it is bounded, alone and together, for the server builds adapters of what is told.
"""

import re
from dataclasses import dataclass
from math import prod

from flwr.app import Message, RecordDict

from core.errors import ReplyError, listing
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
MOST_ADAPTER_VALUES = 10**10
"""Of all factors of one adapter; rank 256 on all linear layers of a 70 B model has a third."""
MOST_PIECES = 10_000


def member_of(answer: Message) -> Member:
    """The member that an answer to `query` describes; ReplyError where it describes none."""
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
    if rank * sum(m + n for _, m, n in shapes) > MOST_ADAPTER_VALUES:
        raise ReplyError(f"an adapter of its rank has more than {MOST_ADAPTER_VALUES:,} values")
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


def claimed_name(answer: Message) -> str:
    """What to call a node that does not take part; the name beside a failure is its word alone."""
    node = answer.metadata.src_node_id
    if registered := (registered_names() or {}).get(node):
        return registered
    content = answer.content if answer.has_content() else RecordDict()
    claimed = failure_of(content).get("client", "") if "failure" in content else ""
    is_name = re.fullmatch(NAME, claimed) and len(claimed) <= LONGEST_NAME
    return f"{claimed}@{node}" if is_name else f"node {node}"
