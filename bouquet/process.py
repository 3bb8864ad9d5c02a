"""How a call shows where it stands, and leaves the process as it found it."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

BESIDE_THE_POINT = ("IProgress not found", "`is_gradient_checkpointing` is deprecated")
"""How warnings begin that no user can act upon: tqdm's in a notebook, transformers' about PEFT."""


def console_of(progress: bool) -> Console:
    """The live table of a terminal on the standard error; elsewhere, in a notebook too, lines."""
    if Console().is_jupyter:
        return Console(
            file=sys.stdout, force_jupyter=False, highlight=False, quiet=not progress, width=100
        )
    return Console(stderr=True, highlight=False, quiet=not progress)


@contextmanager
def process_as_found() -> Iterator[None]:
    """What a run sets for the whole process is afterwards what it was before.

    That is what transformers may print, torch's random numbers, the filters of warnings, and the
    threads of NumPy's library.
    """
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    verbosity, bars = _transformers_says()
    torch = sys.modules.get("torch")
    random = torch.get_rng_state() if torch else None
    try:
        with warnings.catch_warnings():
            for words in BESIDE_THE_POINT:
                warnings.filterwarnings("ignore", message=words)
            yield
    finally:
        if transformers := sys.modules.get("transformers"):
            transformers.logging.set_verbosity(verbosity)
            if bars:
                transformers.logging.enable_progress_bar()
        if torch:
            torch.set_rng_state(random)
        if threads is None:
            os.environ.pop("OPENBLAS_NUM_THREADS", None)


def _transformers_says() -> tuple[int, bool]:
    """The least level that it prints, and whether it shows bars; as it begins, if not yet here."""
    found = sys.modules.get("transformers")
    if found is None:
        return logging.WARNING, True
    return found.logging.get_verbosity(), found.logging.is_progress_bar_enabled()
