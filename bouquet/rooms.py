"""Where the rooms lie, and how they are found beside other people's modules of the same names.

The rooms are top-level packages (`adapters`, `settings` ...), for Flower puts an app's code on
`sys.path` and never installs it. Here they lie in `bouquet/app/`, or in an editable install beside
`bouquet/`. A script may have a `settings.py` of its own, and AdapterHub's library is called
`adapters`, too: so the rooms are on `sys.path` and in `sys.modules` only while Bouquet works.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from types import ModuleType

_HERE = Path(__file__).resolve().parent
HOME = _HERE / "app" if (_HERE / "app").is_dir() else _HERE.parent
"""The folder of the rooms."""
ROOMS = frozenset(path.parent.name for path in HOME.glob("*/__init__.py")) - {
    "bouquet",
    "benchmarks",
}
_ours: dict[str, ModuleType] = {}
"""The modules of the rooms, while they are not in `sys.modules`."""
_depth = 0
_one_at_a_time = RLock()


def move_in() -> None:
    """The rooms are found first from now on: for a process that is Bouquet's own.

    Raises ImportError, with the file, where another module of a room's name is found even so.
    """
    global _depth
    _depth += 1
    _swap_in()


@contextmanager
def at_home() -> Iterator[None]:
    """The rooms are found first within; afterwards all is as it was, for the caller's own imports.

    Calls from several threads wait for each other, for `sys.modules` is one for all of them.
    """
    global _depth
    with _one_at_a_time:
        if _depth or _is_found_anyway():
            yield
            return
        theirs = _modules()
        path = list(sys.path)
        _depth += 1
        try:
            _swap_in()
            yield
        finally:
            _depth -= 1
            _ours.update({name: module for name, module in _modules().items() if _is_ours(module)})
            for name in _modules():
                del sys.modules[name]
            sys.modules.update(theirs)
            sys.path[:] = [*path, *(p for p in sys.path if p not in path and p != str(HOME))]


def _swap_in() -> None:
    for name, module in _modules().items():
        if not _is_ours(module):
            del sys.modules[name]
    sys.modules.update({name: module for name, module in _ours.items() if name not in sys.modules})
    sys.path[:] = [str(HOME), *(p for p in sys.path if p != str(HOME))]
    for room, found in _found().items():
        if not found.is_relative_to(HOME):
            raise ImportError(
                f"Bouquet's own package {room!r} lies in {HOME}, but Python finds {found}. "
                "Uninstall one of the two, or keep Bouquet in its own environment"
            )


def _is_found_anyway() -> bool:
    """Whether the rooms are what any import finds, as in the repository: nothing is exchanged."""
    return all(map(_is_ours, _modules().values())) and all(
        found.is_relative_to(HOME) for found in _found().values()
    )


def _found() -> dict[str, Path]:
    """Where an import of each room would find it; nowhere is `.`."""
    specs = {room: find_spec(room) for room in sorted(ROOMS) if room not in sys.modules}
    return {
        room: Path(spec.origin or next(iter(spec.submodule_search_locations or []), "."))
        if spec
        else Path()
        for room, spec in specs.items()
    }


def _modules() -> dict[str, ModuleType]:
    """What is loaded under the name of a room, whoever's it is."""
    loaded = list(sys.modules.items())
    return {name: module for name, module in loaded if name.partition(".")[0] in ROOMS}


def _is_ours(module: ModuleType) -> bool:
    return Path(_file_of(module)).is_relative_to(HOME)


def _file_of(module: ModuleType) -> str:
    """Its file, or its folder where it has no file."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
