"""The global model as a message brings it: merged, start and head, held against the base here."""

from collections.abc import MutableMapping
from functools import lru_cache
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, RecordDict

from adapters.adapter import Adapter, FloatArray, Shapes, draw
from adapters.codec import unpack
from adapters.errors import BouquetError, listing
from adapters.head import unpack_head
from adapters.records import from_record
from client.instruction import Instruction
from client.pieces import sum_of_pieces
from client.shelf import FolderShelf

if TYPE_CHECKING:
    from tasks.tuned_model import TunedModel


def check_base(wanted: str, own: str) -> None:
    """BouquetError that names both where this site's base model is not the run's."""
    if wanted != own:
        raise BouquetError(
            f"the run's base model is {wanted}, but this site's is {own}: both must be the same "
            "weights and tokenizer in the same number format; check model.path, model.dtype and "
            "the site's model-path"
        )


def merged_of(
    content: RecordDict, shapes: Shapes, told: Instruction, shelf: MutableMapping[str, bytes]
) -> Adapter | None:
    """`merged` as it came, or the sum of the pieces that came and those that this site has."""
    if told.pieces is None:
        return _part(content, "merged", shapes)
    keeps = shelf if isinstance(shelf, FolderShelf) else None
    return _fitting("merged", sum_of_pieces(content, told.pieces, keeps), shapes)


def start_of(content: RecordDict, shapes: Shapes, rank: int, told: Instruction) -> Adapter | None:
    """`start`; a factor that did not travel is drawn from the run's seed."""
    known = draw(shapes, rank, told.start_seed, scale=1.0) if told.receives != "both" else None
    return _part(content, "start", shapes, known)


def head_of(content: RecordDict, tuned: "TunedModel", seed: int) -> dict[str, FloatArray]:
    """The head that was sent, or before there is one that which every site draws alike."""
    record = content.get("head")
    if isinstance(record, ArrayRecord):
        return unpack_head(from_record(record), tuned.head_shapes)
    return tuned.initial_head(seed)


def _part(
    content: RecordDict, name: str, shapes: Shapes, known: Adapter | None = None
) -> Adapter | None:
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        return None
    packed = from_record(record)
    part = _unpack_once(packed) if known is None else unpack(packed, known)
    return _fitting(name, part, shapes)


def _fitting(name: str, part: Adapter | None, shapes: Shapes) -> Adapter | None:
    if part is not None and (odd := set(part.shapes.items()) ^ set(shapes.items())):
        raise BouquetError(
            f"the run's {name} does not fit lora.target-modules: it differs from what this site "
            f"adapts in {listing(sorted(odd))}"
        )
    return part


@lru_cache(maxsize=2)
def _unpack_once(packed: bytes) -> Adapter:
    """One process that plays many clients decodes the same global model once."""
    return unpack(packed)
