"""How well a classifier sorts: numbers beside the loss, over all held-out examples at once."""

from collections.abc import Sequence


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Share of the examples whose prediction is their label.

    >>> accuracy([0, 1, 1, 2], [0, 1, 0, 2])
    0.75
    """
    hits = sum(label == guess for label, guess in zip(labels, predictions, strict=True))
    return hits / len(labels)


def macro_f1(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Mean F1 over the classes that occur as a label or as a prediction, each counting the same.

    F1 of a class is 2 TP / (2 TP + FP + FN), and 0 without a true positive.

    >>> round(macro_f1([0, 0, 0, 1], [0, 0, 0, 0]), 3)  # 6/7 and 0
    0.429
    """
    scores = []
    pairs = list(zip(labels, predictions, strict=True))
    for one in sorted({*labels, *predictions}):
        hits = sum(label == one and guess == one for label, guess in pairs)
        named = sum((label == one) + (guess == one) for label, guess in pairs)
        scores.append(2 * hits / named)
    return sum(scores) / len(scores)
