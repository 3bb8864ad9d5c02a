"""Federated LoRA fine-tuning from Python: `bouquet.simulate`, `compare` and `open`.

All else (settings, adapters, strategies ...) lies in rooms that are found only while one of these
works, so that modules of the same names in your own project stay yours: see docs/python.md.

>>> import bouquet
>>> sorted(bouquet.__all__)
['BouquetError', 'Comparison', 'Run', 'UsageError', 'compare', 'open', 'simulate']
"""

from typing import TYPE_CHECKING, Any

from bouquet.rooms import at_home

if TYPE_CHECKING:
    from bouquet.calls import compare, simulate
    from bouquet.calls import open_folder as open  # noqa: A004
    from bouquet.results import Comparison, Run
    from core.errors import BouquetError, UsageError

__all__ = ["BouquetError", "Comparison", "Run", "UsageError", "compare", "open", "simulate"]
_FOUND_IN = {
    "BouquetError": ("core.errors", "BouquetError"),
    "Comparison": ("bouquet.results", "Comparison"),
    "Run": ("bouquet.results", "Run"),
    "UsageError": ("core.errors", "UsageError"),
    "compare": ("bouquet.calls", "compare"),
    "open": ("bouquet.calls", "open_folder"),
    "simulate": ("bouquet.calls", "simulate"),
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first used: `import bouquet` alone loads nothing."""
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'bouquet' has no attribute {name!r}")
    from importlib import import_module

    module, there = _FOUND_IN[name]
    with at_home():
        return getattr(import_module(module), there)


def __dir__() -> list[str]:
    """For completion in a notebook."""
    return sorted(__all__)
