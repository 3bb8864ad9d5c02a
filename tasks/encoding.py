"""From text to token ids: template, truncation, which tokens count, and batches of like length.

[ prompt through the template ][ response ][ ending, end of text ][ padding ]
                                `------- tokens in the loss ------'

Or, for a classifier, the whole text with its tokenizer's special tokens, and the class it is of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters.errors import UsageError
from settings.run import DataSettings
from tasks.examples import Example

IGNORED = -100
SHAPE_STEP = 32
"""Batches come in few shapes, because kernels compiled for a shape are kept: with every shape its
own, a process that trained ten clients on the CPU in bfloat16 held half as much memory again."""
MEGABATCH = 32
"""Batches sorted by length at a time: little padding, and still a random order."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example as token ids; the loss begins at `loss_from` (at least 1)."""

    ids: npt.NDArray[np.int64]
    loss_from: int
    label: int = -1
    """Number of the class that the text is of; -1 where tokens are predicted."""


@dataclass(frozen=True)
class Encoding:
    """Encoded examples, and what had to be cut to fit them into the context."""

    examples: list[Encoded]
    cut: int
    """Responses, or texts to classify, that lost their end."""
    dropped: int
    """Examples whose prompt left no room for a response, or whose response or text is empty."""


def encode(tokenizer: Any, examples: Sequence[Example], data: DataSettings) -> Encoding:
    """Token ids of each example, at most data.context long.

    The prompt keeps its first data.max-prompt tokens, the response what room is left. Prompt and
    response are tokenized apart, so that the boundary is the same in training and generation.
    """
    prompts = _prompt_ids(tokenizer, [example.prompt for example in examples], data)
    endings = [example.response + data.ending for example in examples]
    responses = _ids(tokenizer, endings, special=False)
    encoded, cut, dropped = [], 0, 0
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        whole = (
            [*response, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else response
        )
        room = data.context - len(prompt)
        start = len(prompt) if data.loss_on == "response" else 0
        start = max(start, 1)  # the first token has nothing before it to be predicted from
        fits = room > 0 and len(prompt) + min(len(whole), room) > start
        if not fits or not example.response:
            dropped += 1
            continue
        cut += len(whole) > room
        encoded.append(Encoded(np.array([*prompt, *whole[:room]], np.int64), start))
    return Encoding(encoded, cut, dropped)


def _prompt_ids(tokenizer: Any, prompts: list[str], data: DataSettings) -> list[list[int]]:
    if data.text:
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return [list(begin) for _ in prompts]
    if data.chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "data.chat-template is set, but this model's tokenizer has no chat template: take "
                "data.template instead"
            )
        return [
            list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": _shorten(tokenizer, prompt, data.max_prompt)}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                )
            )
            for prompt in prompts
        ]
    before, _, after = data.template.partition("{prompt}")
    head, *tail = _ids(tokenizer, [before], special=True) + _ids(tokenizer, [after], special=False)
    bodies = _ids(tokenizer, prompts, special=False)
    return [[*head, *body[: data.max_prompt], *tail[0]] for body in bodies]


def _shorten(tokenizer: Any, text: str, limit: int) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:limit]))


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if not texts:  # which tokenizers do not expect
        return []
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
        labels[row, example.loss_from : len(example.ids)] = example.ids[example.loss_from :]
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


def _pad(
    examples: Sequence[Encoded], pad_id: int, longest: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and attention mask, (batch, width)."""
    width = max(len(example.ids) for example in examples)
    width = max(width, min(-(-width // SHAPE_STEP) * SHAPE_STEP, longest))
    ids = np.full((len(examples), width), pad_id, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
    return ids, mask
