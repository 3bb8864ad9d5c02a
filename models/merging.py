"""`merged` and the frozen base: the only place where the base's number format matters.

    Dense    W + delta, written into W: a float32 base
    Beside   x W' + x delta', a frozen float32 branch: any other base, which is never written

Added into a bfloat16 weight, a delta of a thousandth of W is mostly rounded away, and a quantized
weight has no room for it at all.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from adapters.adapter import Delta, Factors
from adapters.adapter import Dense as DenseDelta

Layers = Mapping[str, nn.Module]


class Merging(Protocol):
    """How the layers of a model come to compute W + delta(merged)."""

    def apply(self, merged: Delta | None) -> None:
        """Replace what was merged before; None: the base alone."""


def holds_float32(frozen: Layers) -> bool:
    """Whether every one of these layers holds its weight in float32."""
    return all(layer.weight.dtype == torch.float32 for layer in frozen.values())


class Dense:
    """W + delta in the float32 weight itself, always from the pristine W: nothing accumulates."""

    def __init__(self, frozen: Layers) -> None:
        self._frozen = frozen
        self._pristine: dict[str, torch.Tensor] = {}

    def apply(self, merged: Delta | None) -> None:
        """Write W + delta; None restores the very bytes of W."""
        for name, layer in self._frozen.items():
            weight: Any = layer.weight
            if merged is None and name not in self._pristine:
                continue
            pristine = self._pristine.setdefault(name, weight.detach().clone())
            if merged is None:
                weight.data.copy_(pristine)
                continue
            delta = _delta(merged[name], weight.device)
            weight.data.copy_(pristine + (delta.T if isinstance(layer, Conv1D) else delta))
        if merged is None:
            self._pristine.clear()

    def pristine(self, name: str) -> torch.Tensor | None:
        """The layer's weight before anything was merged, as the layer lays it out; None: as is."""
        return self._pristine.get(name)


class Beside:
    """A branch of float32 beside each layer; the sum of all is rounded once, at its end.

    base layer    x W'                     in its own format
    here          x W' + x delta'          in float32, however the base computes
    LoRA layer    ... + s B A x            by PEFT, in float32
    here          back in the format of x W'
    """

    def __init__(self, lora_layers: Mapping[str, LoraLayer]) -> None:
        self._layers = lora_layers
        self._hooks: list[RemovableHandle] = []

    def apply(self, merged: Delta | None) -> None:
        """Put the branches in place of those of before, which are freed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, layer in self._layers.items() if merged is not None else ():
            delta = merged[name]  # type: ignore[index]
            if not delta.rank:
                continue
            base = layer.get_base_layer()
            branch = _Branch(delta, base.weight.device)
            self._hooks.append(base.register_forward_hook(branch.add))
            self._hooks.append(layer.register_forward_hook(branch.round))


class _Branch:
    """x delta', by factors or by the matrix, frozen in float32."""

    def __init__(self, delta: Factors | DenseDelta, device: torch.device) -> None:
        if isinstance(delta, DenseDelta):
            chain = [delta.values]
        else:
            chain = [delta.a, delta.b * delta.scale]
        self._chain = [torch.tensor(matrix, dtype=torch.float32, device=device) for matrix in chain]
        self._format = torch.float32

    def add(self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        self._format = output.dtype
        value: torch.Tensor = inputs[0].to(torch.float32)
        for matrix in self._chain:
            value = functional.linear(value, matrix)
        return output.float() + value

    def round(
        self, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return output.to(self._format)


def _delta(delta: Factors | DenseDelta, device: torch.device) -> torch.Tensor:
    """The dense delta, (m, n), in float32."""
    if isinstance(delta, DenseDelta):
        return torch.from_numpy(delta.values).to(device)
    b, a = (torch.from_numpy(half).to(device) for half in (delta.b, delta.a))
    dense: torch.Tensor = delta.scale * (b @ a)
    return dense
