"""Text as token ids: no more of a long text than is needed, and special tokens as plain text.

A text of megabytes of which 192 tokens stay is not tokenized whole. What a tokenizer makes of a
beginning may differ from what it makes of the whole, but only near the end: no token depends on
what stands thousands of characters behind it. So two beginnings, of n and of 2 n characters, that
agree in the tokens wanted and go on well beyond them agree with the whole.

A tokenizer reads `</s>` in a text as the token that ends it. Text that comes from data is split
inside such words, so that they are text and end nothing.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MARGIN = 128
"""Tokens beyond those wanted that a beginning must give: the last ones depend on what follows."""
CHARACTERS = 16
"""Characters of the first beginning for each token; most tokens cover fewer."""


@dataclass(frozen=True)
class Tokens:
    """Token ids, and from where to where in the text each of them reaches."""

    ids: list[int]
    offsets: npt.NDArray[np.int64]  # (tokens, 2); (0, 2) unless they were asked for


class SpecialTokens:
    """The tokens that a tokenizer keeps for itself, such as the end of a text or of a turn."""

    def __init__(self, tokenizer: Any) -> None:
        ids = {
            token.content: at
            for at, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        words = sorted((word for word in ids if len(word) > 1), key=lambda word: (-len(word), word))
        self._pattern = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        # an unknown character is no special token that a text spells
        self._ids = frozenset(ids[word] for word in words) - {tokenizer.unk_token_id}

    def spelled_in(self, text: str) -> bool:
        """Whether the text spells one."""
        return self._pattern.search(text) is not None

    def at(self, text: str, position: int) -> str:
        """The one that the text spells at this position; empty where there is none."""
        match = self._pattern.match(text, position)
        return match[0] if match else ""

    def end(self, text: str) -> bool:
        """Whether the text ends with one."""
        return any(match.end() == len(text) for match in self._pattern.finditer(text))

    def cuts(self, text: str) -> list[int]:
        """Where to split a text so that none of its pieces spells one."""
        cuts: set[int] = set()
        while more := set(self._inside(text, sorted(cuts))):  # what is left may spell another
            cuts |= more
        return sorted(cuts)

    def stray(self, text: str, cuts: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether a text split so gave more of them than its pieces spell."""
        found = sum(token in self._ids for token in ids)
        return found > 0 and found > len(self._inside(text, cuts))

    def _inside(self, text: str, cuts: Sequence[int]) -> list[int]:
        """The second character of each that a piece spells."""
        pieces = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [m.start() + 1 for a, b in pieces for m in self._pattern.finditer(text, a, b)]


def enough(tokenizer: Any, text: str, count: int) -> str:
    """A beginning of the text whose first `count` tokens are those of the whole text.

    It has more than `count` tokens where the whole text has more.
    """
    size = CHARACTERS * (count + MARGIN)
    shorter: list[int] = []
    while size < len(text):
        ids = _call(tokenizer, [text[:size]], offsets=False)[0].ids
        if len(ids) >= count + MARGIN:
            if shorter and shorter[:count] == ids[:count]:
                return text[:size]
            shorter = ids
        size *= 2
    return text


def tokenize(
    tokenizer: Any, texts: Sequence[str], cuts: Sequence[Sequence[int]], offsets: bool = False
) -> list[Tokens]:
    """Tokens of each text, without those that the tokenizer puts around it.

    cuts: where a text is split, so that no token reaches across.
    offsets: of tokenizers that know them (`is_fast`).
    """
    whole = [text for text, where in zip(texts, cuts, strict=True) if not where]
    tokens = iter(_call(tokenizer, whole, offsets))
    return [
        _in_pieces(tokenizer, text, where, offsets) if where else next(tokens)
        for text, where in zip(texts, cuts, strict=True)
    ]


def _in_pieces(tokenizer: Any, text: str, cuts: Sequence[int], offsets: bool) -> Tokens:
    bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [
        _within(tokenizer, text[begin:end], offsets, first=begin == 0)
        for begin, end in pairwise(bounds)
    ]
    places = [piece.offsets + begin for piece, begin in zip(pieces, bounds, strict=False)]
    return Tokens([token for piece in pieces for token in piece.ids], np.concatenate(places))


def _within(tokenizer: Any, piece: str, offsets: bool, first: bool) -> Tokens:
    """Tokens of a piece from the middle of a text, where SentencePiece puts no space before it."""
    if first:
        return _call(tokenizer, [piece], offsets)[0]
    line_break, after = _call(tokenizer, ["\n", "\n" + piece], offsets)
    skip = len(line_break.ids)
    if after.ids[:skip] != line_break.ids:
        return _call(tokenizer, [piece], offsets)[0]
    return Tokens(after.ids[skip:], np.maximum(after.offsets[skip:] - 1, 0))


def _call(tokenizer: Any, texts: list[str], offsets: bool) -> list[Tokens]:
    if not texts:  # which tokenizers do not expect
        return []
    if not offsets:
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [Tokens(list(row), np.zeros((0, 2), np.int64)) for row in rows]
    with _exact_offsets(tokenizer):
        found = tokenizer(
            texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
    return [
        Tokens(list(row), np.array(places, np.int64).reshape(-1, 2))
        for row, places in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


@contextmanager
def _exact_offsets(tokenizer: Any) -> Iterator[None]:
    """Offsets with the white space that tokens hold, which a post-processor may leave out."""
    backend = tokenizer.backend_tokenizer
    kept, backend.post_processor = backend.post_processor, None
    try:
        yield
    finally:
        backend.post_processor = kept
