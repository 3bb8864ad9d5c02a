"""For whom a run waits, since when, and what it says of that."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.errors import listing, quoted
from core.units import counted

LONGEST_SILENCE_SECONDS = 60.0
INTRODUCTIONS = "answers of sites"
"""The purpose of the wait before a run, in which who cannot take part is left out."""
COMING_BACK = "sites to come back"
"""The purpose of a wait for sites that nobody asked anything: they are not connected."""


@dataclass(frozen=True)
class Waiting:
    """One look at a wait that goes on."""

    purpose: str
    """What is waited for: "answers of sites", "training", "clients evaluate"."""
    here: tuple[str, ...]
    """Who has answered."""
    missing: tuple[str, ...]
    """Who was asked and has not."""
    more: int
    """So many sites beyond these are needed, and not connected."""
    seconds: float
    """Since the wait began."""
    left: float
    """Seconds until it ends."""
    late: tuple[str, ...] = ()
    """Of the missing, who was silent for so long that it was asked again."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Who has answered and cannot take part, and why."""

    def __str__(self) -> str:
        """The wait in one line.

        >>> print(Waiting("training", ("bergen",), ("oslo", "tromso"), 0, 40.0, 560.0))
        waiting for 2 of 3 sites, since 40 s; here: bergen; silent: oslo, tromso
        """
        absent = len(self.missing) + self.more
        total = counted(absent + len(self.here), "site")
        parts = [f"waiting for {absent} of {total}, since {self.seconds:.0f} s"]
        parts.append(f"here: {listing(self.here, limit=20)}" if self.here else "nobody is here")
        if self.missing:
            parts.append(f"silent: {listing(self.missing, limit=20)}")
        if self.late:
            parts.append(f"asked again: {listing(self.late, limit=20)}")
        if self.left_out:
            reasons = (f"{name} ({quoted(why, 200)})" for name, why in self.left_out.items())
            parts.append(f"left out: {listing(reasons, limit=3)}")
        return "; ".join(parts)


class Sparingly:
    """Which looks at a wait are worth a line: the first, then ever fewer, at last one a minute.

    >>> tell = Sparingly()
    >>> def look(seconds):
    ...     return tell.due(Waiting("training", (), ("oslo",), 0, seconds, 600.0 - seconds))
    >>> [second for second in range(200) if look(float(second))]
    [0, 1, 3, 7, 15, 31, 63, 123, 183]
    """

    def __init__(self) -> None:
        self._next = 0.0
        self._last = 0.0
        self._here: tuple[str, ...] = ()
        self._left_out: set[str] = set()

    def due(self, waiting: Waiting) -> bool:
        """Whether this look should be told; a new wait, or who came, begins anew.

        The end of a wait in which all have come is not: what follows is told by itself.
        """
        if not waiting.missing and not waiting.more:
            return False
        if waiting.seconds < self._last:
            self._next, self._here, self._left_out = 0.0, (), set()
        self._last = waiting.seconds
        came = waiting.here != self._here or waiting.left_out.keys() - self._left_out
        if waiting.seconds < self._next and not came:
            return False
        self._here, self._left_out = waiting.here, set(waiting.left_out)
        self._next = waiting.seconds + min(1.0 + waiting.seconds, LONGEST_SILENCE_SECONDS)
        return True
