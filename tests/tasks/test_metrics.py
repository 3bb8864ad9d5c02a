"""Accuracy and macro-F1 against counts made by hand and against precision and recall."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.metrics import accuracy, macro_f1
from tests.adapter_generators import QUICK


def by_precision_and_recall(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Macro-F1 as the mean of harmonic means, from a confusion matrix."""
    size = 1 + max(*labels, *predictions)
    confusion = np.zeros((size, size))
    np.add.at(confusion, (np.array(labels), np.array(predictions)), 1)
    scores = []
    for one in range(size):
        actual, named, right = confusion[one].sum(), confusion[:, one].sum(), confusion[one, one]
        if actual + named == 0:
            continue
        precision, recall = right / max(named, 1), right / max(actual, 1)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return float(np.mean(scores))


@pytest.mark.parametrize(
    ("labels", "predictions", "share", "score"),
    [
        ([0, 1], [0, 1], 1.0, 1.0),
        ([0, 1], [1, 0], 0.0, 0.0),
        ([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 3 / 5, (1 / 2 + 2 / 3) / 2),
        ([0, 0, 0], [0, 0, 2], 2 / 3, (4 / 5 + 0) / 2),  # class 1 occurs nowhere
        ([2, 1, 0, 0], [0, 0, 0, 0], 2 / 4, (2 / 3 + 0 + 0) / 3),
        ([5], [5], 1.0, 1.0),
    ],
)
def test_values_counted_by_hand(
    labels: list[int], predictions: list[int], share: float, score: float
) -> None:
    assert accuracy(labels, predictions) == pytest.approx(share)
    assert macro_f1(labels, predictions) == pytest.approx(score)


PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


@QUICK
@given(PAIRS)
def test_macro_f1_is_that_of_precision_and_recall(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = [a for a, _ in pairs], [b for _, b in pairs]
    found = macro_f1(labels, predictions)
    assert found == pytest.approx(by_precision_and_recall(labels, predictions), abs=1e-12)
    assert accuracy(labels, predictions) == pytest.approx(
        float(np.mean(np.array(labels) == np.array(predictions)))
    )


def test_of_unequal_lengths_there_is_no_score() -> None:
    for metric in (accuracy, macro_f1):
        with pytest.raises(ValueError, match="zip"):
            metric([0, 1], [0])
