"""The task `classification`: which labels there are, and texts as token ids with their class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapters.errors import UsageError, listing
from settings.labels import label_order
from settings.run import DataSettings
from tasks.encoding import Encoded, Encoding
from tasks.examples import CLASSIFICATION, Example, read_data
from tasks.reasons import CUT, EMPTY, SPECIAL
from tasks.token_ids import SpecialTokens, enough


def label_names(
    data: DataSettings, task: str, path: str | None = None, seed: int = 0
) -> tuple[str, ...]:
    """The labels in the order of the classes; none for a task without classes.

    They are those of data.labels, or else all in the data, sorted: by value where all are numbers,
    else as text.
    path: a site's own data, from which it cannot know the other sites' labels.
    seed: that of the run, so that the data are read once for labels and examples.

    Raises UsageError for fewer than two labels, or where a site's own data would have to tell them.
    """
    if task != CLASSIFICATION:
        return ()
    if named := data.listed_labels():
        return named
    if path is not None:
        raise UsageError(
            f"data.labels is empty, and {path} holds this site's labels only: set data.labels to "
            "the labels of all sites, separated by commas, the same in the whole run"
        )
    found = read_data(data, task=CLASSIFICATION, limit=data.max_examples, seed=seed).labels
    if len(found) < 2:
        raise UsageError(
            f"{data.path} has one label only in field {data.label!r}, {listing(found)}, and "
            "classification needs at least two: name the right field with data.label, or all "
            "labels with data.labels"
        )
    return tuple(label_order(set(found)))


def encode_texts(
    tokenizer: Any, examples: Sequence[Example], data: DataSettings, labels: Sequence[str]
) -> Encoding:
    """Token ids of each text with the tokenizer's special tokens, at most data.context of them.

    A text without a visible character is dropped. Raises UsageError for a label not among `labels`.
    """
    number = {label: index for index, label in enumerate(labels)}
    if odd := sorted({example.response for example in examples} - set(number)):
        raise UsageError(
            f"the data hold the label {odd[0]!r}, which is not among the labels of the run "
            f"({listing(labels)}): set data.labels to all labels there are"
        )
    special = SpecialTokens(tokenizer)
    kept = [example for example in examples if example.prompt.strip()]
    texts = [enough(tokenizer, example.prompt, data.context + 1) for example in kept]
    counts = Counter({EMPTY: len(examples) - len(kept)})
    encoded = []
    for example, text, ids in zip(kept, texts, _ids(tokenizer, texts), strict=True):
        counts[SPECIAL] += special.spelled_in(example.prompt)
        if len(ids) > data.context:
            counts[CUT] += 1
            ids = _ids(tokenizer, [text], truncation=True, max_length=data.context)[0]
        encoded.append(Encoded(np.array(ids, np.int64), len(ids), number[example.response]))
    return Encoding(encoded, +counts)


def _ids(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    """Ids with the tokenizer's special tokens around a text, of which none stands in it."""
    if not texts:  # which tokenizers do not expect
        return []
    rows = tokenizer(texts, split_special_tokens=True, verbose=False, **options)["input_ids"]
    return [list(row) for row in rows]
