"""What a competent user writes by hand to train the same LoRA factors: no federation, no server.

A transformers model, PEFT's get_peft_model, AdamW (fused), clipping, a learning-rate schedule and
bfloat16 autocast where the run has it; the same batches of the same examples in the same order. It
comes in two forms:

    same     batches padded and the loss computed as Bouquet does: few widths, logits from the first
             target on, cross-entropy at the targets alone
    by-hand  padded to the longest, the model's own `loss` from `labels=`, logits at every position

Only against `same` does a ratio say what the runtime costs. `by-hand` is the loop of most
tutorials; what is saved against it is no merit of the runtime.

    python -m benchmarks.plain_loop --loop same --set local.max-steps=2     # as a whole job
"""

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from adapters.adapter import Adapter, draw
from client.training import computes_in_bfloat16, learning_rate, plan_steps
from models.base_model import embedded_model_path
from settings.keys import read_assignment
from settings.run import RunSettings, run_settings
from settings.seeds import derive_seed
from settings.site import client_name
from tasks.encoding import SHAPE_STEP, Encoded, encode, order_batches
from tasks.partition import federate, global_held_out

EVALUATION_BATCH = 32
IGNORED = -100
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Work:
    """One client's training in one round."""

    start: Adapter
    batches: list[list[Encoded]]


def own_loss(model: Any, batch: Tensors) -> torch.Tensor:
    """Mean loss per target as transformers computes it."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def targets_loss(model: Any, batch: Tensors) -> torch.Tensor:
    """The same mean from the logits that it needs, in few shapes."""
    labels = batch["labels"]
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    first = max(1, first // SHAPE_STEP * SHAPE_STEP)
    keep = labels.shape[1] - first + 1
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=keep
    ).logits[:, :-1]
    wanted = labels[:, first:] != IGNORED
    return functional.cross_entropy(logits[wanted].float(), labels[:, first:][wanted])


LOOPS: dict[str, tuple[Callable[[Any, Tensors], torch.Tensor], int]] = {
    "same": (targets_loss, SHAPE_STEP),
    "by-hand": (own_loss, 1),
}
"""Name -> the loss, and what widths are a multiple of."""


class PlainLoop:
    """A PEFT model with one adapter for each rank, and the examples of every client."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        path = embedded_model_path()
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.config.use_cache = False
        first, *others = sorted(set(settings.ranks()))
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self.model: Any = peft.get_peft_model(model, self._lora(first), f"r{first}")
        for rank in others:
            self.model.add_adapter(f"r{rank}", self._lora(rank))
        self.bfloat16 = computes_in_bfloat16(settings.local.precision, torch.device("cpu"))
        data, clients = settings.data, settings.clients.count
        parts = federate(data, clients, settings.seed).parts
        self.examples = [encode(self.tokenizer, part.train, data).examples for part in parts]
        limit = settings.evaluate.max_examples
        held_out = global_held_out(data, clients, settings.seed, limit)
        self.held_out = encode(self.tokenizer, held_out, data).examples

    def _lora(self, rank: int) -> peft.LoraConfig:
        alpha = self.settings.lora.scale_of(rank) * rank
        return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")

    def works(self, server_round: int) -> Iterator[Work]:
        """What each client trains in this round: the very batches that the simulation gives it."""
        settings, local = self.settings, self.settings.local
        shapes = {
            name.removeprefix("base_model.model."): tuple(layer.get_base_layer().weight.shape)
            for name, layer in self._layers()
        }
        for number, examples in enumerate(self.examples):
            seed = derive_seed(settings.seed, server_round, client_name(number))
            rank = settings.lora.rank_of(number)
            lengths = [len(example.ids) for example in examples]
            indices = [
                batch
                for epoch in range(local.epochs)
                for batch in order_batches(lengths, local.batch_size, seed + epoch)
            ][: plan_steps(len(examples), local)]
            start = draw(shapes, rank, seed, settings.lora.scale_of(rank))
            yield Work(start, [[examples[index] for index in batch] for batch in indices])

    def _layers(self) -> list[tuple[str, Any]]:
        kind = peft.tuners.lora.LoraLayer
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, kind)]

    def train(self, work: Work, loop: str) -> tuple[float, int]:
        """Train from the work's start; summed loss and targets."""
        local, (loss_of, step_of_width) = self.settings.local, LOOPS[loop]
        adapter = f"r{work.start.rank}"
        self.model.set_adapter(adapter)
        with torch.no_grad():
            for name, layer in self._layers():
                factors = work.start[name.removeprefix("base_model.model.")]
                layer.lora_A[adapter].weight.copy_(torch.from_numpy(factors.a))
                layer.lora_B[adapter].weight.copy_(torch.from_numpy(factors.b))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=local.learning_rate, weight_decay=local.weight_decay, fused=True
        )
        steps, total, tokens = len(work.batches), 0.0, 0
        self.model.train()
        for step, examples in enumerate(work.batches):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, local)
            batch = self._pad(examples, step_of_width)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                loss = loss_of(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, local.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            targets = int((batch["labels"] != IGNORED).sum())
            total += loss.item() * targets
            tokens += targets
        return total, tokens

    @torch.no_grad()
    def evaluate(self, loop: str) -> float:
        """Mean held-out loss per target, shortest examples first."""
        loss_of, step_of_width = LOOPS[loop]
        self.model.eval()
        order = sorted(self.held_out, key=lambda example: len(example.ids))
        total, tokens = 0.0, 0
        for at in range(0, len(order), EVALUATION_BATCH):
            batch = self._pad(order[at : at + EVALUATION_BATCH], step_of_width)
            targets = int((batch["labels"] != IGNORED).sum())
            total += loss_of(self.model, batch).item() * targets
            tokens += targets
        return total / tokens

    def _pad(self, examples: Sequence[Encoded], step: int) -> Tensors:
        ids = [torch.from_numpy(example.ids) for example in examples]
        labels = [row.clone() for row in ids]
        for row, example in zip(labels, examples, strict=True):
            row[: example.loss_from] = IGNORED
        mask = [torch.ones_like(row) for row in ids]
        extra = -max(map(len, ids)) % step
        columns = {
            "input_ids": (ids, self.tokenizer.pad_token_id),
            "attention_mask": (mask, 0),
            "labels": (labels, IGNORED),
        }
        return {
            name: functional.pad(pad_sequence(rows, True, value), (0, extra), value=value)
            for name, (rows, value) in columns.items()
        }


def main() -> None:
    """The plain job as a process: imports, model, data, all rounds of all clients, evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loop", choices=LOOPS, default="same")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = run_settings(dict(read_assignment(text) for text in arguments.set))
    loop = PlainLoop(settings)
    with loop.model.disable_adapter():
        base = loop.evaluate(arguments.loop)
    tokens = 0
    for server_round in range(1, settings.rounds + 1):
        tokens += sum(loop.train(work, arguments.loop)[1] for work in loop.works(server_round))
        loop.evaluate(arguments.loop)
    print(json.dumps({"base_loss": base, "train_tokens": tokens}))


if __name__ == "__main__":
    main()
