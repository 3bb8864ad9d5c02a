"""Sizes and counts as people say them."""

from collections.abc import Collection


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> human_bytes(1_234_567), human_bytes(0), human_bytes(512)
    ('1.23 MB', '0 B', '512 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def counted(count: int, noun: str) -> str:
    """So many of something, whose plural ends in s.

    >>> counted(1, "round"), counted(1200, "example")
    ('1 round', '1,200 examples')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def from_to(values: Collection[int]) -> str:
    """The range of some numbers, at least one.

    >>> from_to([12, 9, 30]), from_to([12, 12])
    ('9 to 30', '12')
    """
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
