"""The task `classification`: texts as token ids with their class."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import UsageError, listing
from settings.run import DataSettings
from tasks.encoding import Encoded, Encoding
from tasks.examples import Example
from tasks.reasons import CUT, EMPTY, SPECIAL
from tasks.token_ids import SpecialTokens, enough


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
