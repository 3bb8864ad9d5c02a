"""The global model as a message brings it: merged and start, held against the base here."""

from collections.abc import MutableMapping
from functools import lru_cache

from flwr.app import ArrayRecord, RecordDict

from adapters.adapter import Adapter, Delta, Shapes, draw
from client.pieces import open_pieces
from client.shelf import FolderShelf
from core.errors import BouquetError, listing
from wire.codec import unpack, unpack_delta
from wire.messages import Instruction
from wire.records import from_record
from wire.rules import BOTH


def check_base(wanted: str, own: str) -> None:
    """BouquetError that names both where this site's base model is not the run's."""
    if wanted != own:
        raise BouquetError(
            f"the run's base model is {wanted}, but this site's is {own}: both must be the same "
            "weights and tokenizer in the same number format; check model.path, model.dtype and "
            "the site's model-path"
        )


def model_of(
    content: RecordDict,
    shapes: Shapes,
    rank: int,
    told: Instruction,
    shelf: MutableMapping[str, bytes],
) -> tuple[Delta | None, Adapter | None]:
    """Merged and start: as they came, or from the pieces that came and those that this site has.

    A factor of the start that did not travel is drawn from the run's seed.
    """
    merged, start = None, None
    if told.parts is not None:
        keeps = shelf if isinstance(shelf, FolderShelf) else None
        merged, start = open_pieces(content, told.parts, keeps)
    elif isinstance(record := content.get("merged"), ArrayRecord):
        merged = _merged_once(from_record(record))
    if isinstance(record := content.get("start"), ArrayRecord):
        packed = from_record(record)
        if told.rule.receives == BOTH:
            start = _start_once(packed)
        else:
            start = unpack(packed, draw(shapes, rank, told.start_seed, scale=1.0))
    for name, part in (("merged", merged), ("start", start)):
        if part is not None:
            _check_fits(name, part, shapes)
    return merged, start


def _check_fits(name: str, part: Delta, shapes: Shapes) -> None:
    if odd := set(part.shapes.items()) ^ set(shapes.items()):
        raise BouquetError(
            f"the run's {name} does not fit lora.target-modules: it differs from what this site "
            f"adapts in {listing(sorted(odd))}"
        )


# One process that plays many clients decodes the same global model once.
_merged_once = lru_cache(maxsize=1)(unpack_delta)
_start_once = lru_cache(maxsize=1)(unpack)
