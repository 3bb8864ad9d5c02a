"""Batches of evaluation: as many examples at a time as a budget of tokens has room for."""

from collections.abc import Iterator, Sequence

from tasks.encoding import padded_width


def batches_within(tokens: int, lengths: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Indices in batches of at most so many tokens, padding included, shortest examples first.

    An example that is longer than the budget has a batch alone.
    longest: what the model takes at most, beyond which no batch is padded.

    >>> list(batches_within(100, [30, 70, 8, 31, 200], longest=512))
    [[2, 0, 3], [1], [4]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * padded_width(lengths[index], longest) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
