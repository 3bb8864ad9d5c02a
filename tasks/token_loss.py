"""The loss of a language model without the logits of a whole batch.

    body    input ids          -> hidden states, (batch, length, hidden)
    here    hidden states      -> those of which the next token is a target, (targets, hidden)
    model   a chunk of them    -> logits, (chunk, vocabulary), in float32 -> summed cross-entropy

Logits are the largest thing that training makes: 16 texts of 512 tokens over 50,000 words take
1.6 GB in float32, and as much for each of softmax and gradient. A batch whose logits are small
takes the model's own way, in one piece. In training the logits of a chunk are computed again for
its gradient.

A chunk goes through the model's own forward, whose body returns the hidden states at hand: what a
model does to its logits (Gemma's soft cap, Granite's and Cohere's scale) is done here too.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tasks.encoding import IGNORED, Batch

LOGITS_AT_ONCE = 1 << 24
"""Logits in one piece: 64 MB in float32."""


class TokenLoss:
    """Summed cross-entropy over a batch's target tokens, in nats; float32, differentiable."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._body_output: Any = None
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.in_chunks = self._can_chunk()
        """Whether this model's logits are a function of each hidden state alone."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The loss of this batch under the model as it stands."""
        rows, width = batch.input_ids.shape
        if self.in_chunks and rows * (width - batch.first_target + 1) > self._positions:
            return self._chunked(batch)
        return self._whole(batch)

    def most_logits(self, tokens: int) -> int:
        """How many logits are held at once of a batch of so many tokens."""
        chunk = min(tokens, self._positions) if self.in_chunks else tokens
        return chunk * self.vocabulary

    @property
    def _positions(self) -> int:
        """How many hidden states make one chunk."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    def _whole(self, batch: Batch) -> torch.Tensor:
        """From logits of all positions from the first target on."""
        keep = batch.input_ids.shape[1] - batch.first_target + 1
        last = {"logits_to_keep": keep} if self._keeps_last else {}
        output = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **last)
        labels = batch.labels[:, batch.first_target :]
        wanted = labels != IGNORED
        logits = output.logits[:, -keep:-1][wanted].float()
        return functional.cross_entropy(logits, labels[wanted], reduction="sum")

    def _chunked(self, batch: Batch) -> torch.Tensor:
        hidden = self._hidden(batch.input_ids, batch.attention_mask)
        labels = batch.labels[:, batch.first_target :]
        wanted = labels != IGNORED
        states = hidden[:, batch.first_target - 1 : -1][wanted]  # (targets, hidden)
        total = torch.zeros((), device=states.device)
        pieces = (torch.split(tensor, self._positions) for tensor in (states, labels[wanted]))
        for chunk, right in zip(*pieces, strict=True):
            if torch.is_grad_enabled():
                total = total + checkpoint(
                    self._chunk_loss, chunk, right, use_reentrant=False, preserve_rng_state=False
                )
            else:
                total = total + self._chunk_loss(chunk, right)
        return total

    def _chunk_loss(self, states: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        logits = self._logits(states[None])[0].float()
        return functional.cross_entropy(logits, right, reduction="sum")

    def _hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self._model.base_model(input_ids=input_ids, attention_mask=attention_mask)
        self._body_output = type(output)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of hidden states, (1, chunk, hidden)."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _returning(self._model.base_model, self._body_output(last_hidden_state=hidden)):
            logits: torch.Tensor = self._model(input_ids=ids).logits
        return logits

    @torch.no_grad()
    def _can_chunk(self) -> bool:
        """Tried on four tokens: the same logits to the bit, and of the last two without the first.

        The latter only nearly, since products of other shapes round differently.
        """
        body = self._model.base_model
        if body is self._model:
            return False
        ids = torch.arange(4, device=next(self._model.parameters()).device)[None] % self.vocabulary
        whole = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        try:
            hidden = self._hidden(ids, torch.ones_like(ids))
            found, last = self._logits(hidden), self._logits(hidden[:, 2:])
        except (AttributeError, TypeError, ValueError, RuntimeError):  # a body of another kind
            return False
        near = 0.02 * float(whole.float().abs().max())
        return torch.equal(found, whole) and bool(
            torch.allclose(last.float(), whole[:, 2:].float(), rtol=0.0, atol=near)
        )


@contextmanager
def _returning(body: Any, output: Any) -> Iterator[None]:
    """Within this context the model's body returns this output, whatever it is given."""
    before = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before
