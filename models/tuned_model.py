"""One base model, resident in the process, with a slot into which adapters are swapped.

PEFT holds the LoRA layers. There is one slot, for any rank: it takes a client's factors in float32,
is read after training, and holds nothing in between. `merged` lies in or beside the frozen weights
(models/merging.py). With labels the model is a classifier, whose head trains beside the factors and
comes and goes with them.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import peft
import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, Delta, FloatArray
from adapters.algebra import pad
from adapters.head import Head
from core.errors import UsageError
from models.base_model import load_base_model
from models.expert_matrices import as_matrices
from models.merging import Beside, Dense, Merging, holds_float32
from models.quantization import float32_weight, shape_of
from models.slots import HeadSlot, LoraSlot
from models.targets import find_target_modules, find_target_parameters, left_out
from settings.keys import listed
from settings.run import DataSettings, LoraSettings, ModelSettings
from settings.site import Site
from tasks.classification import encode_texts
from tasks.encoding import Batch, Encoded, Encoding, collate, collate_texts, encode
from tasks.examples import Example, Examples
from tasks.metrics import accuracy, macro_f1
from tasks.reasons import refusal
from tasks.token_budget import batches_within
from tasks.token_loss import TokenLoss

SLOT = "slot"
EVALUATION_TOKENS = 2048
"""Of one forward pass, where nobody says how many."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over the targets, in nats: target tokens, or the classes of examples."""

    loss: float
    tokens: int
    """How many targets there are."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`accuracy` and `macro_f1` of a classifier, from 0 to 1; else none."""


class TunedModel:
    """The base model with LoRA layers in its target modules; with labels, a classifier."""

    def __init__(
        self,
        settings: ModelSettings,
        targets: str,
        labels: Sequence[str] = (),
        parameters: Sequence[str] = (),
    ) -> None:
        self.labels = tuple(labels)
        self.base = load_base_model(
            settings.path,
            settings.dtype,
            settings.device,
            self.labels,
            settings.trust_remote_code,
            settings.quantization,
        )
        self.model: Any = self.base.model
        layers = find_target_modules(self.model, targets, self.base.head)
        experts = find_target_parameters(self.model, parameters)
        if experts and (settings.dtype != "float32" or settings.quantization != "none"):
            raise UsageError(
                "lora.target-parameters needs model.dtype=float32 and no model.quantization: "
                "experts compute with W + delta, and a base in fewer bits would round the delta "
                "away"
            )
        self.left_out = left_out(self.model, targets, experts, self.base.head)
        self.targets = sorted(layers + as_matrices(self.model, experts))
        self._head = HeadSlot(self.model, self.base.head, self.base.new)
        self.head_shapes = self._head.shapes
        self.device = next(self.model.parameters()).device
        self.dtype = getattr(torch, settings.dtype)
        """Of activations, and of what is not quantized."""
        self._frozen = {name: self.model.get_submodule(name) for name in self.targets}
        self.shapes = {name: shape_of(layer) for name, layer in self._frozen.items()}
        self.writes_base = holds_float32(self._frozen)
        """Whether `merged` is added into the base's weights, or lies beside them."""
        self._merged: Delta | None = None
        self._token_loss = None if self.labels else TokenLoss(self.model)
        self._encodings: dict[tuple[int, DataSettings], tuple[weakref.ref[Examples], Encoding]] = {}

    def check_rank(self, rank: int) -> None:
        """UsageError where a rank exceeds what a module's matrix can have."""
        for name, shape in self.shapes.items():
            if rank > min(shape):
                raise UsageError(
                    f"rank {rank} is more than module {name} of shape {shape[0]} x {shape[1]} can "
                    f"have: take at most {min(min(s) for s in self.shapes.values())}, or leave "
                    "that module out of lora.target-modules"
                )

    def merge(self, merged: Delta | None) -> None:
        """Make the base compute W + delta(merged), always from the pristine W; None: W alone."""
        if merged is self._merged:
            return
        self._merging.apply(merged)
        self._merged = merged

    @cached_property
    def _merging(self) -> Merging:
        return Dense(self._frozen) if self.writes_base else Beside(self._slot.layers)

    def initial_head(self, seed: int) -> dict[str, FloatArray]:
        """The head before any training: the checkpoint's values, and from the seed what it lacks.

        Empty where the task has no head.
        """
        return self._head.initial(seed)

    @contextmanager
    def adapted(
        self, adapter: Adapter | None, dropout: float = 0.0, head: Head | None = None
    ) -> Iterator[LoraSlot | None]:
        """The model with this adapter in its slot; without one, the (merged) base alone.

        head: a classifier's, in either case; None is `initial_head(0)`.
        """
        if head is not None:
            self._head.write(head)
        if adapter is None:
            try:
                yield None
            finally:
                self._head.reset()
            return
        try:
            # Modules of one rank, so that they train as one; zeros change no delta.
            self._slot.write(pad(adapter, max(adapter.rank, 1)), dropout)
            yield self._slot
        finally:
            self._slot.freeze()
            self._slot.empty()
            self._head.reset()

    @cached_property
    def _slot(self) -> LoraSlot:
        config = peft.LoraConfig(
            r=1,
            lora_alpha=1,
            target_modules=self.targets,
            fan_in_fan_out=isinstance(next(iter(self._frozen.values())), Conv1D),
            init_lora_weights=False,
        )
        peft.inject_adapter_in_model(config, self.model, adapter_name=SLOT)
        layers = {target: self.model.get_submodule(target) for target in self.targets}
        return LoraSlot(SLOT, layers, self._head)

    def pristine_weight(self, name: str) -> torch.Tensor:
        """W of a target module before anything was merged, (m, n), in float32."""
        layer = self._frozen[name]
        kept = self._merging.pristine(name) if isinstance(self._merging, Dense) else None
        if kept is None:
            return float32_weight(layer)
        return kept.T if isinstance(layer, Conv1D) else kept

    def check_checkpointing(self) -> None:
        """UsageError where the model cannot compute its activations again."""
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise UsageError(
                f"local.checkpointing is set, but {type(self.model).__name__} cannot compute its "
                "activations again: set it to false, and a smaller local.batch-size"
            )

    @contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Within this context activations are computed again in the backward pass, not kept.

        The gradients are the same, dropout included. Raises UsageError where the model cannot.
        """
        if not enabled:
            yield
            return
        self.check_checkpointing()
        # transformers renamed it within version 5
        renamed = hasattr(self.model, "activation_checkpointing_enable")
        word = "activation" if renamed else "gradient"
        getattr(self.model, f"{word}_checkpointing_enable")({"use_reentrant": False})
        try:
            yield
        finally:
            getattr(self.model, f"{word}_checkpointing_disable")()

    def encode(self, examples: Sequence[Example], data: DataSettings) -> Encoding:
        """Token ids of these examples; of Examples they are kept until nobody holds those any more.

        Raises UsageError where none fits.
        """
        if data.context > self.base.context:
            raise UsageError(
                f"data.context is {data.context} tokens, but {self.base.path} takes at most "
                f"{self.base.context}: set data.context={self.base.context} or less"
            )
        key = id(examples), data
        kept = self._encodings.get(key)
        if kept is None or kept[0]() is not examples:
            if self.labels:
                encoding = encode_texts(self.base.tokenizer, examples, data, self.labels)
            else:
                encoding = encode(self.base.tokenizer, examples, data)
            if not encoding.examples:
                files = list(dict.fromkeys(example.file for example in examples))
                raise refusal(encoding.counts, len(examples), files, data, bool(self.labels))
            if not isinstance(examples, Examples):
                return encoding
            alive = weakref.ref(examples, lambda gone: self._forget(key, gone))
            kept = self._encodings[key] = (alive, encoding)
        return kept[1]

    def _forget(self, key: tuple[int, DataSettings], gone: weakref.ref[Examples]) -> None:
        """Drop the encoding of examples that nobody holds any more; a newer one may have its id."""
        if key in self._encodings and self._encodings[key][0] is gone:
            del self._encodings[key]

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """These examples as one padded batch on the model's device."""
        pad_id = self.base.tokenizer.pad_token_id or 0
        side_by_side = collate_texts if self.labels else collate
        return side_by_side(examples, pad_id, self.device, self.base.context)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy over the batch's targets, in nats; float32, differentiable."""
        if self._token_loss is not None:
            return self._token_loss(batch)
        return functional.cross_entropy(self._class_logits(batch), batch.labels, reduction="sum")

    def most_logits(self, tokens: int) -> int:
        """How many logits are held at once of a batch of so many tokens; 0 of a classifier."""
        return self._token_loss.most_logits(tokens) if self._token_loss is not None else 0

    def _class_logits(self, batch: Batch) -> torch.Tensor:
        """(batch, classes), in float32."""
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits: torch.Tensor = output.logits.float()
        return logits

    @torch.no_grad()
    def evaluate(
        self, examples: Sequence[Encoded], batch_tokens: int = EVALUATION_TOKENS
    ) -> HeldOutLoss:
        """Mean loss per target of the model as it stands, shortest examples first.

        batch_tokens: most of one forward pass, padding included; a longer example has one alone.
        """
        self.model.eval()
        total, tokens = 0.0, 0
        labels: list[int] = []
        predictions: list[int] = []
        lengths = [len(example.ids) for example in examples]
        for indices in batches_within(batch_tokens, lengths, self.base.context):
            batch = self.batch([examples[index] for index in indices])
            tokens += batch.targets
            if self._token_loss is not None:
                total += float(self._token_loss(batch))
                continue
            logits = self._class_logits(batch)
            total += float(functional.cross_entropy(logits, batch.labels, reduction="sum"))
            labels += batch.labels.tolist()
            predictions += logits.argmax(dim=1).tolist()
        if not self.labels:
            return HeldOutLoss(total / tokens, tokens)
        metrics = {
            "accuracy": accuracy(labels, predictions),
            "macro_f1": macro_f1(labels, predictions),
        }
        return HeldOutLoss(total / tokens, tokens, metrics)

    def evaluate_global(
        self,
        merged: Delta | None,
        start: Adapter | None,
        examples: Sequence[Encoded],
        head: Head | None = None,
        batch_tokens: int = EVALUATION_TOKENS,
    ) -> HeldOutLoss:
        """Held-out loss of W + delta(merged) + delta(start), under this head if it is a classifier.

        None is `initial_head(0)`.
        """
        self.merge(merged)
        with self.adapted(start, head=head):
            return self.evaluate(examples, batch_tokens)


@lru_cache(maxsize=1)
def _resident(
    settings: ModelSettings, targets: str, labels: tuple[str, ...], parameters: tuple[str, ...]
) -> TunedModel:
    return TunedModel(settings, targets, labels, parameters)


def resident_model(
    model: ModelSettings,
    lora: LoraSettings,
    site: Site | None = None,
    labels: Sequence[str] = (),
) -> TunedModel:
    """The one model of this process for these settings; what the site owns wins.

    labels: of a classifier, in the order of its classes; none for a causal language model.

    Raises UsageError where there is no such model, or it cannot be tuned so.
    """
    parameters = listed(lora.target_parameters)
    if parameters and lora.dropout:
        raise UsageError(
            f"lora.dropout={lora.dropout:g} does not go with lora.target-parameters: the experts' "
            "adapters change a weight, whose inputs they never see; set lora.dropout=0"
        )
    if site is not None:
        model = replace(
            model, path=site.model_path or model.path, device=site.device or model.device
        )
        if site.data_path is not None:  # a coordinator alone cannot run code at a site
            trusted = model.trust_remote_code and site.trust_remote_code
            model = replace(model, trust_remote_code=trusted)
    return _resident(model, lora.target_modules, tuple(labels), parameters)
