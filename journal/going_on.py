"""What a person does to go on with a run: the end of many an error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


def by_flower(folder: Path) -> str:
    """How a coordinator goes on with the run in this folder."""
    return f"give the same flwr run command again: with resume=true and output={folder} it goes on"


_advice: ContextVar[Callable[[Path], str]] = ContextVar("advice", default=by_flower)


@contextmanager
def advised(advice: Callable[[Path], str]) -> Iterator[None]:
    """Errors within end with this advice."""
    token = _advice.set(advice)
    try:
        yield
    finally:
        _advice.reset(token)


def how_to_go_on(folder: Path) -> str:
    """The advice of whoever watches this run, for the end of an error."""
    return _advice.get()(folder)
