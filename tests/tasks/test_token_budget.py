"""Batches of evaluation hold every example once and no more tokens than they may."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from tasks.encoding import padded_width
from tasks.token_budget import batches_within


@given(
    lengths=st.lists(st.integers(2, 300), max_size=60),
    tokens=st.integers(1, 5000),
    longest=st.integers(300, 1000),
)
def test_no_batch_exceeds_the_budget_but_one_long_example(
    lengths: list[int], tokens: int, longest: int
) -> None:
    batches = list(batches_within(tokens, lengths, longest))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    sizes = [
        len(batch) * padded_width(max(lengths[i] for i in batch), longest) for batch in batches
    ]
    assert all(
        size <= tokens or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True)
    )
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(order)
    for batch, after in itertools.pairwise(batches):  # and none could take one more
        width = padded_width(lengths[after[0]], longest)
        assert (len(batch) + 1) * width > tokens
