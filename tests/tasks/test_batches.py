"""Batches hold each example once, of like length, in an order that only the seed decides."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.encoding import IGNORED, Encoded, collate, order_batches
from tests.adapter_generators import QUICK

CPU = torch.device("cpu")


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    """Positions that hold no token when these batches are padded."""
    return sum(
        max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch)
        for batch in batches
    )


@QUICK
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=400),
    st.integers(1, 9),
    st.integers(0, 2**62),
)
def test_an_epoch_is_a_permutation_in_as_many_batches_as_it_takes(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = order_batches(lengths, batch_size, seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert max(map(len, batches)) <= batch_size


def test_like_lengths_share_a_batch() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 200, 512)]
    order = np.random.default_rng(1).permutation(512).reshape(-1, 8).tolist()
    assert padding(lengths, order_batches(lengths, 8, seed=0)) < 0.15 * padding(lengths, order)


def test_batches_come_in_random_order_not_by_length() -> None:
    lengths = list(range(1, 129))
    longest = [max(lengths[i] for i in batch) for batch in order_batches(lengths, 4, seed=0)]
    rises = sum(b > a for a, b in pairwise(longest))
    assert 8 <= rises <= 23  # of 31 neighbours: neither sorted nor reversed


def test_the_order_follows_the_seed_and_nothing_else() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6] * 40
    np.random.seed(1)
    first = order_batches(lengths, 4, seed=5)
    np.random.seed(2)
    assert order_batches(lengths, 4, seed=5) == first
    assert order_batches(lengths, 4, seed=6) != first


def test_equal_lengths_are_shuffled_between_epochs() -> None:
    first, second = (order_batches([7] * 64, 4, seed) for seed in (0, 1))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_a_batch_is_padded_on_the_right_and_masked() -> None:
    examples = [
        Encoded(np.array([5, 6, 7, 8, 9], np.int64), loss_from=3),
        Encoded(np.array([4, 3, 2], np.int64), loss_from=1),
    ]
    batch = collate(examples, pad_id=0, device=CPU, longest=5)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, no, 8, 9], [no, 3, 2, no, no]]
    assert (batch.targets, batch.first_target) == (4, 1)
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_a_token_that_equals_the_padding_still_counts() -> None:
    batch = collate([Encoded(np.array([1, 0, 0], np.int64), 1)], 0, CPU, longest=3)
    assert batch.labels.tolist() == [[IGNORED, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert batch.targets == 2


def test_collating_leaves_the_examples_as_they_were() -> None:
    example = Encoded(np.array([1, 2, 3], np.int64), 1)
    batch = collate([example], pad_id=0, device=CPU, longest=3)
    batch.input_ids.fill_(9)
    assert example.ids.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("length", "loss_from", "longest", "width", "first_target"),
    [
        (5, 3, 512, 32, 1),
        (32, 31, 512, 32, 1),
        (33, 32, 512, 64, 32),
        (70, 69, 512, 96, 64),
        (70, 40, 80, 80, 32),
        (70, 40, 70, 70, 32),
    ],
)
def test_batches_come_in_few_shapes_and_never_longer_than_the_model_takes(
    length: int, loss_from: int, longest: int, width: int, first_target: int
) -> None:
    example = Encoded(np.arange(length), loss_from)
    batch = collate([example], 0, CPU, longest)
    assert batch.input_ids.shape == (1, width)
    assert (batch.targets, batch.first_target) == (length - loss_from, first_target)
    assert int(batch.attention_mask.sum()) == length
    assert (batch.labels[:, : batch.first_target] == IGNORED).all()
