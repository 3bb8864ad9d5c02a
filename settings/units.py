"""Sizes as people say them."""


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> human_bytes(1_234_567), human_bytes(0), human_bytes(512)
    ('1.23 MB', '0 B', '512 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
