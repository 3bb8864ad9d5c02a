"""One base model, resident in the process, with slots into which adapters are swapped.

PEFT holds the LoRA layers. There is one slot for each rank that was ever needed, not one for each
client; a client's factors are copied into the slot of their rank and read back after training.
`merged` is added to the frozen weights themselves, always onto the pristine ones, so that nothing
accumulates in the base. With labels the model is a classifier, whose head trains beside the
factors and comes and goes with them.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import peft
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Adapter, Delta, Dense, FloatArray
from adapters.algebra import pad
from adapters.errors import UsageError
from adapters.head import Head
from settings.keys import listed
from settings.run import DataSettings, LoraSettings, ModelSettings
from settings.site import Site
from tasks.base_model import load_base_model
from tasks.classification import encode_texts
from tasks.encoding import IGNORED, Batch, Encoded, Encoding, collate, collate_texts, encode
from tasks.examples import Example
from tasks.expert_matrices import as_matrices
from tasks.metrics import accuracy, macro_f1
from tasks.reasons import refusal
from tasks.slots import HeadSlot, LoraSlot
from tasks.targets import find_target_modules, find_target_parameters, left_out

EVALUATION_BATCH = 32


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
        self._keeps_last_logits = (
            "logits_to_keep" in inspect.signature(self.model.forward).parameters
        )
        self._conv1d = isinstance(self.model.get_submodule(self.targets[0]), Conv1D)
        self.shapes = {name: self._shape(self.model.get_submodule(name)) for name in self.targets}
        self._layers: dict[str, Any] = {}
        self._pristine: dict[str, torch.Tensor] = {}
        self._merged: Delta | None = None
        self._slots: set[str] = set()
        self._encodings: dict[tuple[int, DataSettings], tuple[Sequence[Example], Encoding]] = {}

    def _shape(self, layer: nn.Module) -> tuple[int, int]:
        rows, columns = layer.weight.shape  # type: ignore[misc]
        return (int(columns), int(rows)) if self._conv1d else (int(rows), int(columns))

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
        """Set the base weights to W + delta(merged), from the pristine W; None restores W."""
        if merged is self._merged:
            return
        for name in self.targets:
            weight = self._base_layer(name).weight
            if name not in self._pristine:
                self._pristine[name] = weight.detach().clone()
            full = self._pristine[name].float()
            if merged is not None:
                form = merged[name]
                if isinstance(form, Dense):
                    delta = torch.from_numpy(form.values).to(self.device)
                else:
                    b, a = (torch.from_numpy(half).to(self.device) for half in (form.b, form.a))
                    delta = form.scale * (b @ a)
                full = full + (delta.T if self._conv1d else delta)
            weight.data.copy_(full)
        self._merged = merged

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
        slot = None
        try:
            if adapter is not None:
                # A slot has one rank for all modules, and PEFT knows no rank 0; zeros change no
                # delta.
                adapter = pad(adapter, max(adapter.rank, 1))
                slot = self._slot(adapter.rank, dropout)
                slot.write(adapter)
            self._activate([slot.name] if slot else [])
            yield slot
        finally:
            if slot:
                slot.freeze()
            self._activate([])
            self._head.reset()

    def _slot(self, rank: int, dropout: float) -> LoraSlot:
        name = f"rank-{rank}-dropout-{dropout:g}".replace(".", "_")
        if name not in self._slots:
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=rank,
                lora_dropout=dropout,
                target_modules=self.targets,
                fan_in_fan_out=self._conv1d,
                init_lora_weights=False,
            )
            with warnings.catch_warnings():  # that there is more than one adapter is the point
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                peft.inject_adapter_in_model(config, self.model, adapter_name=name)
            self._slots.add(name)
            self._layers = {target: self.model.get_submodule(target) for target in self.targets}
        return LoraSlot(name, self._layers, self._head)

    def _activate(self, names: list[str]) -> None:
        for layer in self._layers.values():
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names)

    def pristine_weight(self, name: str) -> torch.Tensor:
        """W of a target module before anything was merged, (m, n), in float32."""
        now: torch.Tensor = self._base_layer(name).weight
        weight = self._pristine.get(name, now).detach().float()
        return weight.T if self._conv1d else weight

    def _base_layer(self, name: str) -> Any:
        layer = self.model.get_submodule(name)
        return layer.get_base_layer() if isinstance(layer, peft.tuners.lora.LoraLayer) else layer

    def encode(self, examples: Sequence[Example], data: DataSettings) -> Encoding:
        """Token ids of these examples, kept for the next round; UsageError where none fits."""
        if data.context > self.base.context:
            raise UsageError(
                f"data.context is {data.context} tokens, but {self.base.path} takes at most "
                f"{self.base.context}: set data.context={self.base.context} or less"
            )
        kept = self._encodings.get((id(examples), data))
        if kept is None:
            if self.labels:
                encoding = encode_texts(self.base.tokenizer, examples, data, self.labels)
            else:
                encoding = encode(self.base.tokenizer, examples, data)
            if not encoding.examples:
                files = list(dict.fromkeys(example.file for example in examples))
                raise refusal(encoding.counts, len(examples), files, data, bool(self.labels))
            kept = self._encodings[id(examples), data] = (examples, encoding)
        return kept[1]

    def batch(self, examples: Sequence[Encoded]) -> Batch:
        """These examples as one padded batch on the model's device."""
        pad_id = self.base.tokenizer.pad_token_id or 0
        side_by_side = collate_texts if self.labels else collate
        return side_by_side(examples, pad_id, self.device, self.base.context)

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy over the batch's targets, in nats; float32, differentiable."""
        logits, wanted = self._targets(batch)
        return functional.cross_entropy(logits, wanted, reduction="sum")

    def _targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in float32, (targets, choices), and the right choices, (targets,).

        Of a language model they are computed from the first target on, and kept at targets only.
        """
        if self.labels:
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return output.logits.float(), batch.labels
        keep = batch.input_ids.shape[1] - batch.first_target + 1
        last = {"logits_to_keep": keep} if self._keeps_last_logits else {}
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **last)
        labels = batch.labels[:, batch.first_target :]
        logits = output.logits[:, -keep:-1]
        wanted = labels != IGNORED
        return logits[wanted].float(), labels[wanted]

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Encoded]) -> HeldOutLoss:
        """Mean loss per target of the model as it stands, shortest examples first."""
        self.model.eval()
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        total, tokens = 0.0, 0
        labels: list[int] = []
        predictions: list[int] = []
        for at in range(0, len(order), EVALUATION_BATCH):
            batch = self.batch([examples[i] for i in order[at : at + EVALUATION_BATCH]])
            logits, wanted = self._targets(batch)
            total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += batch.targets
            if self.labels:
                labels += wanted.tolist()
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
    ) -> HeldOutLoss:
        """Held-out loss of W + delta(merged) + delta(start), under this head if it is a classifier.

        None is `initial_head(0)`.
        """
        self.merge(merged)
        with self.adapted(start, head=head):
            return self.evaluate(examples)


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
