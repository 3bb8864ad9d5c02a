"""From text to token ids: template, truncation, which tokens count, and batches of like length.

[ prompt through the template ][ response ][ ending, end of text ][ padding ]
                                `------- tokens in the loss ------'

Or, for a classifier, the whole text with its tokenizer's special tokens, and the class it is of.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.errors import UsageError, listing
from settings.run import DataSettings
from settings.templates import PROMPT, Field, Part, parts_for, template_fields
from tasks.chat_template import ChatTemplate, Rendered
from tasks.conversations import ASSISTANT, USER, Turn
from tasks.examples import Example
from tasks.reasons import (
    AS_TOKENS,
    CUT,
    DROPPED,
    EMPTY,
    ENDLESS,
    NO_ASSISTANT,
    NO_ROOM,
    REWRITTEN,
    SHORTENED,
    SPECIAL,
    TOO_SHORT,
    UNSAFE,
)
from tasks.token_ids import SpecialTokens, Tokens, enough, tokenize

IGNORED = -100
SHAPE_STEP = 32
"""Batches come in few shapes, because kernels compiled for a shape are kept: with every shape its
own, a process that trained ten clients on the CPU in bfloat16 held half as much memory again."""
MEGABATCH = 32
"""Batches sorted by length at a time: little padding, and still a random order."""
TOGETHER = 1024
"""Examples tokenized at a time: what the tokenizer says of each token is large."""
NOTHING = Rendered("", (), (), rewritten=False, endless=False)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example as token ids; the loss begins at `loss_from` (at least 1)."""

    ids: npt.NDArray[np.int64]
    loss_from: int
    label: int = -1
    """Number of the class that the text is of; -1 where tokens are predicted."""
    spans: tuple[tuple[int, int], ...] = ()
    """From where to where tokens count, in order, the first from `loss_from`; empty: to the end."""


@dataclass(frozen=True)
class Encoding:
    """Encoded examples, and how many were cut, left out or odd, each under its own reason."""

    examples: list[Encoded]
    counts: Mapping[str, int] = field(default_factory=dict)
    """Reason, of tasks/reasons.py -> examples."""

    @property
    def cut(self) -> int:
        """Responses, conversations, or texts to classify, that lost their end."""
        return self.counts.get(CUT, 0)

    @property
    def dropped(self) -> int:
        """Examples that were left out, for whatever reason."""
        return sum(self.counts.get(reason, 0) for reason in DROPPED)


@dataclass(frozen=True)
class _Outcome:
    """What became of one example."""

    encoded: Encoded | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Ids:
    """Token ids of a part of an example, and what befell it."""

    ids: list[int]
    reasons: tuple[str, ...] = ()


def encode(tokenizer: Any, examples: Sequence[Example], data: DataSettings) -> Encoding:
    """Token ids of each example, at most data.context long.

    The prompt keeps its first data.max-prompt tokens, the response what room is left. Prompt and
    response are tokenized apart, so that the boundary is the same in training and generation. A
    conversation has the tokens of its rendering and loses its end where that is too long.

    Raises UsageError where a conversation has no chat template, or one that does not fit.
    """
    asked = not data.text and (data.chat_template or bool(data.chat_template_file))
    as_chat = [asked or bool(example.turns) for example in examples]
    template = ChatTemplate(tokenizer, data) if any(as_chat) else None
    special = SpecialTokens(tokenizer)
    outcomes: list[_Outcome] = []
    for at in range(0, len(examples), TOGETHER):
        marks = as_chat[at : at + TOGETHER]
        part = list(zip(examples[at : at + TOGETHER], marks, strict=True))
        pairs = iter(_pairs(tokenizer, special, [e for e, chat in part if not chat], data))
        chats = [e for e, chat in part if chat]
        talks = iter(_conversations(tokenizer, special, template, chats, data) if template else ())
        outcomes += [next(talks) if chat else next(pairs) for chat in marks]
    return Encoding(
        [outcome.encoded for outcome in outcomes if outcome.encoded is not None],
        Counter(reason for outcome in outcomes for reason in outcome.reasons),
    )


def _pairs(
    tokenizer: Any, special: SpecialTokens, examples: list[Example], data: DataSettings
) -> list[_Outcome]:
    """Prompt through the template, and response."""
    prompts = _prompts(tokenizer, special, examples, data)
    responses = _responses(tokenizer, special, examples, data)
    return [
        _pair(tokenizer, example, prompt, response, data)
        for example, prompt, response in zip(examples, prompts, responses, strict=True)
    ]


def _pair(
    tokenizer: Any,
    example: Example,
    prompt: _Ids,
    response: _Ids,
    data: DataSettings,
) -> _Outcome:
    eos = tokenizer.eos_token_id
    whole = response.ids if eos is None else [*response.ids, eos]
    room = data.context - len(prompt.ids)
    start = len(prompt.ids) if data.loss_on == "response" else 0
    start = max(start, 1)  # the first token has nothing before it to be predicted from
    if not example.response:
        return _Outcome(None, (EMPTY,))
    if UNSAFE in (*prompt.reasons, *response.reasons):
        return _Outcome(None, (UNSAFE,))
    if room <= 0:
        return _Outcome(None, (NO_ROOM,))
    if len(prompt.ids) + min(len(whole), room) <= start:
        return _Outcome(None, (TOO_SHORT,))
    reasons = {*prompt.reasons, *response.reasons}
    if len(whole) > room:
        reasons.add(CUT)
    elif eos is None:
        reasons.add(ENDLESS)
    ids = np.array([*prompt.ids, *whole[:room]], np.int64)
    return _Outcome(Encoded(ids, start), tuple(sorted(reasons)))


def _responses(
    tokenizer: Any, special: SpecialTokens, examples: list[Example], data: DataSettings
) -> list[_Ids]:
    """Responses with their ending, of long ones as much as can matter."""
    texts = [enough(tokenizer, example.response, data.context + 1) for example in examples]
    endings = [
        data.ending if len(text) == len(example.response) else ""
        for text, example in zip(texts, examples, strict=True)
    ]
    if data.text:  # running text may be written with the tokens that it is to train on
        joined = [text + ending for text, ending in zip(texts, endings, strict=True)]
        rows = tokenize(tokenizer, joined, [()] * len(joined))
        return [
            _Ids(row.ids, (AS_TOKENS,) if special.spelled_in(example.response) else ())
            for row, example in zip(rows, examples, strict=True)
        ]
    return _as_plain_text(tokenizer, special, texts, endings)


def _as_plain_text(
    tokenizer: Any, special: SpecialTokens, texts: Sequence[str], endings: Sequence[str] = ()
) -> list[_Ids]:
    """Ids of texts in which nothing is a special token.

    endings: what goes behind each text, where special tokens are what they are.
    """
    cuts = [special.cuts(text) for text in texts]
    joined = [text + ending for text, ending in zip_longest(texts, endings, fillvalue="")]
    rows = tokenize(tokenizer, joined, cuts)
    return [
        _Ids(row.ids, _spelled(special, text, where, row.ids))
        for row, text, where in zip(rows, joined, cuts, strict=True)
    ]


def _spelled(
    special: SpecialTokens, text: str, cuts: Sequence[int], ids: Sequence[int]
) -> tuple[str, ...]:
    """Reasons of a text that was split where it spells special tokens."""
    reasons = (SPECIAL,) if cuts else ()
    return (*reasons, UNSAFE) if special.stray(text, cuts, ids) else reasons


def _prompts(
    tokenizer: Any, special: SpecialTokens, examples: list[Example], data: DataSettings
) -> list[_Ids]:
    if data.text:
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return [_Ids(list(begin)) for _ in examples]
    values = [_values(example, data) for example in examples]
    layouts = [parts_for(data.template, fields) for fields in values]
    texts = [
        enough(tokenizer, fields[part.name], data.max_prompt + 1)
        for layout, fields in zip(layouts, values, strict=True)
        for part in layout
        if isinstance(part, Field)
    ]
    bodies = iter(_as_plain_text(tokenizer, special, texts))
    around: dict[tuple[str, bool], list[int]] = {}
    return [_prompt(tokenizer, layout, bodies, around, data.max_prompt) for layout in layouts]


def _values(example: Example, data: DataSettings) -> dict[str, str]:
    """The fields that the template takes, by name."""
    values = {PROMPT: example.prompt, **dict(example.fields)}
    if missing := [name for name in template_fields(data.template) if name not in values]:
        raise UsageError(
            f"data.template names {listing(f'{{{name}}}' for name in missing)}, and the data have "
            f"no such field; they have {listing(f'{{{name}}}' for name in values)}"
        )
    return values


def _prompt(
    tokenizer: Any,
    layout: Sequence[Part],
    bodies: Iterator[_Ids],
    around: dict[tuple[str, bool], list[int]],
    limit: int,
) -> _Ids:
    """The template's own text whole, and of its fields together at most `limit` tokens.

    around: what the template's own texts are as token ids, filled as they come.
    """
    parts: list[list[int] | _Ids] = []
    for at, part in enumerate(layout):
        if isinstance(part, Field):
            parts.append(next(bodies))
            continue
        if (part, at == 0) not in around:
            around[part, at == 0] = _ids(tokenizer, [part], special=at == 0)[0]
        parts.append(around[part, at == 0])
    fields = [part for part in parts if isinstance(part, _Ids)]
    lengths = iter(share([len(part.ids) for part in fields], limit))
    ids: list[int] = []
    for filled in parts:
        ids += filled.ids[: next(lengths)] if isinstance(filled, _Ids) else filled
    reasons = {reason for part in fields for reason in part.reasons}
    if sum(len(part.ids) for part in fields) > limit:
        reasons.add(SHORTENED)
    return _Ids(ids, tuple(reasons))


def share(lengths: Sequence[int], limit: int) -> list[int]:
    """How much of each field stays so that together they are within the limit.

    The longest lose first, down to a common length, or one token more where that does not divide.

    >>> share([3, 20, 9], 17), share([3, 4], 9)
    ([3, 7, 7], [3, 4])
    """
    kept, left = list(lengths), limit
    shortest_first = sorted(range(len(kept)), key=lambda at: (lengths[at], -at))
    for rank, at in enumerate(shortest_first):
        kept[at] = min(lengths[at], left // (len(kept) - rank))
        left -= kept[at]
    return kept


def _conversations(
    tokenizer: Any,
    special: SpecialTokens,
    template: ChatTemplate,
    examples: list[Example],
    data: DataSettings,
) -> list[_Outcome]:
    opened = [_turns(tokenizer, special, example, data) for example in examples]
    rendered = [template.render(turns) if turns else NOTHING for turns, _ in opened]
    texts = [enough(tokenizer, each.text, data.context + 1) for each in rendered]
    rows = tokenize(tokenizer, texts, [each.cuts for each in rendered], offsets=True)
    outcomes = []
    for (turns, reasons), each, text, tokens in zip(opened, rendered, texts, rows, strict=True):
        if not turns:
            outcomes.append(_Outcome(None, reasons))
        elif special.stray(text, [cut for cut in each.cuts if cut < len(text)], tokens.ids):
            outcomes.append(_Outcome(None, (UNSAFE,)))
        else:
            outcomes.append(_conversation(each, tokens, reasons, data))
    return outcomes


def _turns(
    tokenizer: Any, special: SpecialTokens, example: Example, data: DataSettings
) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns of an example, none where there is nothing to learn, and what befell it."""
    reasons: tuple[str, ...] = ()
    turns = example.turns
    if not turns:
        prompt, reasons = _user_turn(tokenizer, special, example, data)
        answer = example.response + data.ending if example.response else ""
        turns = (Turn(USER, prompt), Turn(ASSISTANT, answer))
    answers = [turn.content.strip() for turn in turns if turn.role == ASSISTANT]
    if not any(answers):
        return (), (EMPTY if answers else NO_ASSISTANT,)
    if any(special.spelled_in(turn.content) for turn in turns):
        reasons += (SPECIAL,)
    return turns, reasons


def _user_turn(
    tokenizer: Any, special: SpecialTokens, example: Example, data: DataSettings
) -> tuple[str, tuple[str, ...]]:
    """The fields of the template one after another, at most data.max-prompt tokens of them."""
    values = _values(example, data)
    fields = (values[name] for name in template_fields(data.template))
    text = "\n\n".join(field for field in fields if field.strip())
    begin = enough(tokenizer, text, data.max_prompt + 1)
    (tokens,) = tokenize(tokenizer, [begin], [special.cuts(begin)], offsets=True)
    if len(tokens.ids) <= data.max_prompt:
        return text, ()
    return begin[: tokens.offsets[data.max_prompt][0]], (SHORTENED,)


def _conversation(
    rendered: Rendered, tokens: Tokens, reasons: tuple[str, ...], data: DataSettings
) -> _Outcome:
    """What of a conversation lies within the context, and which of its tokens count."""
    ids = np.array(tokens.ids[: data.context], np.int64)
    cut = len(tokens.ids) > data.context
    spans = _token_spans(tokens, rendered.spans, len(ids))
    if not rendered.spans:  # the template leaves the assistant out
        return _Outcome(None, (NO_ASSISTANT,))
    if not spans:
        return _Outcome(None, (NO_ROOM if cut else TOO_SHORT,))
    found = {CUT: cut, REWRITTEN: rendered.rewritten, ENDLESS: rendered.endless}
    reasons += tuple(reason for reason, holds in found.items() if holds)
    if data.loss_on == "all":
        return _Outcome(Encoded(ids, 1), reasons)
    return _Outcome(Encoded(ids, spans[0][0], spans=spans), reasons)


def _token_spans(
    tokens: Tokens, spans: Sequence[tuple[int, int]], length: int
) -> tuple[tuple[int, int], ...]:
    """The tokens that lie within these spans of the text, of the first `length` tokens.

    A token that begins before a span and ends in it is not the assistant's alone.
    """
    places = tokens.offsets[:length]
    found = []
    for start, end in spans:
        inside = np.flatnonzero(
            (places[:, 0] >= start) & (places[:, 1] > start) & (places[:, 1] <= end)
        )
        inside = inside[inside > 0]  # the first token has nothing before it
        if len(inside):
            found.append((int(inside[0]), int(inside[-1]) + 1))
    return tuple(found)


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    rows = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    if special and tokenizer.eos_token_id is not None:  # some append it; ours comes at the end
        begin = [tokenizer.bos_token_id]  # which in some models is the same token
        rows = [
            row[:-1] if row and row != begin and row[-1] == tokenizer.eos_token_id else row
            for row in rows
        ]
    return [list(row) for row in rows]


def order_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """One epoch: indices in batches of like length, batches in random order.

    >>> sorted(index for batch in order_batches([3, 9, 4, 8], 2, seed=0) for index in batch)
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([seed, 4])
    order = [int(index) for index in rng.permutation(len(lengths))]
    span = batch_size * MEGABATCH
    batches: list[list[int]] = []
    for at in range(0, len(order), span):
        near = sorted(order[at : at + span], key=lambda index: lengths[index])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[int(index)] for index in rng.permutation(len(batches))]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side, padded on the right."""

    input_ids: torch.Tensor  # (batch, length)
    attention_mask: torch.Tensor  # (batch, length)
    labels: torch.Tensor  # (batch, length), IGNORED where no loss is taken; or (batch,), classes
    targets: int
    """Tokens that count in the loss; or examples, each of which has one class."""
    first_target: int
    """No row has a target before this position, so nothing before it needs logits."""


def collate(examples: Sequence[Encoded], pad_id: int, device: torch.device, longest: int) -> Batch:
    """A batch from examples; the labels are the ids themselves, shifted by the loss.

    The width is a multiple of SHAPE_STEP, or `longest`, what the model takes at most.
    """
    ids, mask = _pad(examples, pad_id, longest)
    labels = np.full(ids.shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        for start, end in example.spans or ((example.loss_from, len(example.ids)),):
            labels[row, start:end] = example.ids[start:end]
    first = min(example.loss_from for example in examples)
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        torch.from_numpy(labels).to(device),
        targets=int((labels != IGNORED).sum()),
        first_target=max(1, first // SHAPE_STEP * SHAPE_STEP),
    )


def collate_texts(
    examples: Sequence[Encoded], pad_id: int, device: torch.device, longest: int
) -> Batch:
    """A batch of texts to classify, as wide as `collate` makes it."""
    ids, mask = _pad(examples, pad_id, longest)
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        torch.tensor([example.label for example in examples], device=device),
        targets=len(examples),
        first_target=0,
    )


def padded_width(length: int, longest: int) -> int:
    """The width of a batch whose longest row has this length.

    >>> padded_width(33, longest=512), padded_width(33, longest=40)
    (64, 40)
    """
    return max(length, min(-(-length // SHAPE_STEP) * SHAPE_STEP, longest))


def _pad(
    examples: Sequence[Encoded], pad_id: int, longest: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and attention mask, (batch, width)."""
    width = padded_width(max(len(example.ids) for example in examples), longest)
    ids = np.full((len(examples), width), pad_id, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
    return ids, mask
