"""How a client describes itself: its answer to a query.

Every size in it is bounded, alone and together, for the server builds adapters of what it is told.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from core.errors import ReplyError, listing
from settings.keys import as_list, listed
from settings.labels import canonical_label
from settings.site import NAME
from wire.fields import Fields, config, text, texts, whole, wholes
from wire.records import to_record

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


@dataclass(frozen=True)
class SiteCard:
    """One client, in its own words."""

    client: str
    """What it calls itself; the server knows it by its key."""
    number: int
    rank: int
    num_examples: int
    base: str
    """The identity of its base model."""
    shapes: tuple[tuple[str, int, int], ...]
    """(module, m, n) of each module that it adapts, sorted."""
    head_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(name, shape) of each array that it trains beside them, sorted."""
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its classes."""
    data: str = ""
    """Hash of the data that it trains on; empty where it did not say."""
    template: str = ""
    """Hash of the file with a chat template that it was told to use; empty: the base's own."""
    holds: frozenset[str] | None = None
    """The pieces of merged that it has, by version; None: it does not say."""
    principal: bytes | None = field(default=None, repr=False)
    """The leading singular directions of its base, packed, where it was asked for them."""

    def to_records(self) -> RecordDict:
        """The answer to a query.

        >>> card = SiteCard("oslo", 0, 4, 10, "tiny", (("q", 6, 8),))
        >>> SiteCard.from_records(card.to_records()) == card
        True
        """
        site: dict[str, Any] = {
            "client": self.client,
            "number": self.number,
            "rank": self.rank,
            "num-examples": self.num_examples,
            "base": self.base,
            "data": self.data,
            "chat-template": self.template,
            "modules": [name for name, _, _ in self.shapes],
            "rows": [m for _, m, _ in self.shapes],
            "columns": [n for _, _, n in self.shapes],
            "head": [name for name, _ in self.head_shapes],
            "head-shapes": ["x".join(map(str, shape)) for _, shape in self.head_shapes],
            "labels": list(self.labels),
        }
        if self.holds is not None:
            site["holds"] = sorted(self.holds)
        content = RecordDict({"site": ConfigRecord(site)})
        if self.principal is not None:
            content["principal"] = to_record(self.principal)
        return content

    @classmethod
    def from_records(cls, content: RecordDict) -> "SiteCard":
        """The card in an answer to a query; ReplyError where it holds none, or a senseless one."""
        site = config(content, "site")
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
        return cls(
            client=text(site, "client", LONGEST_NAME, NAME),
            number=whole(site, "number", 0, MAX_NUMBER),
            rank=rank,
            num_examples=whole(site, "num-examples", 0, MAX_EXAMPLES),
            base=text(site, "base", LONGEST_BASE),
            shapes=shapes,
            head_shapes=head_shapes,
            labels=_labels(site, max((shape[0] for _, shape in head_shapes), default=0)),
            data=text({"data": "", **site}, "data", 64, HASH),
            template=text({"chat-template": "", **site}, "chat-template", 64, HASH),
            holds=pieces_held(site),
        )


def pieces_held(record: Fields) -> frozenset[str] | None:
    """The pieces that a client says it has, by version; None where it does not say."""
    if "holds" not in record:
        return None
    return frozenset(texts(record, "holds", MOST_PIECES, 64, HASH))


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
