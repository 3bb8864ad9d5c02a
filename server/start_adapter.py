"""A run that begins from an adapter: its delta is merged into the global model before round one.

    merged_0 = what the method begins with + s B A,   head_0 = the adapter's, where it has one

From then on it is a part of `merged`, which is frozen and cumulative under every method, and of the
saved state: a resumed run does not read the adapter again. A copy of its files stays in the run's
folder, for what is compared with the run later, and must begin where it began.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.adapter import Delta, Shapes
from adapters.algebra import add
from adapters.head import HeadShapes
from adapters.peft_files import CONFIG, LABELS, WEIGHTS, PeftAdapter, read_peft
from core.errors import BouquetError
from core.files import flush_folder, write_durably
from settings.run import RunSettings
from strategies.strategy import GlobalModel

COPY = "start-adapter"
"""The folder of the copy, in the run's."""


def read_start_adapter(
    settings: RunSettings,
    shapes: Shapes,
    head_shapes: HeadShapes | None = None,
    labels: Sequence[str] = (),
) -> PeftAdapter | None:
    """The adapter that `start.adapter` names, over the modules of the run; None where it is empty.

    Where the run in settings.output keeps a copy, that is read.

    labels: of the classes, in order; by default those of data.labels.
    Raises UsageError where it is none that a run can begin from.
    """
    if not settings.start.adapter:
        return None
    labels = labels or settings.data.listed_labels()
    copy = Path(settings.output) / COPY
    kept = settings.output != "" and copy.is_dir()
    folder = copy if kept else Path(settings.start.adapter).expanduser()
    return read_peft(folder, shapes, head_shapes, labels)


def keep_start_adapter(settings: RunSettings, run: Path) -> None:
    """Copy the adapter's files into the run's folder, all or nothing, where it begins from one.

    Raises BouquetError where they cannot be read any more, or the disk takes no copy.
    """
    if not settings.start.adapter or (run / COPY).is_dir():
        return
    source = Path(settings.start.adapter).expanduser()
    scratch = run / f".writing-{COPY}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        for file in (source / CONFIG, source / WEIGHTS, source / LABELS):
            if file.is_file():
                write_durably(scratch / file.name, file.read_bytes())
        scratch.rename(run / COPY)
        flush_folder(run)
    except OSError as error:
        raise BouquetError(
            f"the adapter in {source} could not be copied to {run / COPY}: {error.strerror}. Free "
            "some space, or see to its files, then begin the run anew"
        ) from error


def with_adapter(model: GlobalModel, found: PeftAdapter | None) -> GlobalModel:
    """The global model with this adapter in `merged`, and its head."""
    if found is None:
        return model
    deltas: list[Delta] = [found.adapter]
    if model.merged is not None:
        deltas = [model.merged, found.adapter]
    merged = add(deltas, [1.0] * len(deltas))
    return replace(model, merged=merged, head=found.head or model.head)
