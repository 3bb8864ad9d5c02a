"""A run that begins from an adapter: its delta is merged into the global model before round one.

    merged_0 = what the method begins with + s B A,   head_0 = the adapter's, where it has one

From then on it is a part of `merged`, which is frozen and cumulative under every method, and of the
saved state: a resumed run does not read the adapter again.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.adapter import Delta, Shapes
from adapters.algebra import add
from adapters.head import HeadShapes
from adapters.peft_files import PeftAdapter, read_peft
from adapters.terms import PLUS, Term
from settings.run import RunSettings
from strategies.strategy import GlobalModel


def read_start_adapter(
    settings: RunSettings,
    shapes: Shapes,
    head_shapes: HeadShapes | None = None,
    labels: Sequence[str] = (),
) -> PeftAdapter | None:
    """The adapter that `start.adapter` names, over the modules of the run; None where it is empty.

    labels: of the classes, in order; by default those of data.labels.
    Raises UsageError where it is none that a run can begin from.
    """
    if not settings.start.adapter:
        return None
    labels = labels or settings.data.listed_labels()
    return read_peft(Path(settings.start.adapter).expanduser(), shapes, head_shapes, labels)


def with_adapter(model: GlobalModel, found: PeftAdapter | None) -> GlobalModel:
    """The global model with this adapter in `merged`, and its head."""
    if found is None:
        return model
    deltas: list[Delta] = [found.adapter]
    if model.merged is not None:
        deltas = [model.merged, found.adapter]
    increment = model.increment
    if increment is not None:
        increment = (*increment, Term(PLUS, found.adapter))
    merged = add(deltas, [1.0] * len(deltas))
    return replace(model, merged=merged, head=found.head or model.head, increment=increment)
