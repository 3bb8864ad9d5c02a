"""What is written into the model, trained and read back: LoRA factors, and a classifier's head."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from adapters.adapter import Adapter, Factors, FloatArray
from adapters.head import Head, draw_head, head_shapes
from core.errors import AdapterError, listing


class HeadSlot:
    """The head's parameters, held and trained in float32; without names there is none."""

    def __init__(self, model: nn.Module, names: Sequence[str], new: Collection[str]) -> None:
        self._parameters = {name: model.get_parameter(name) for name in names}
        self.shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        half = [name for name, p in self._parameters.items() if p.dtype != torch.float32]
        for name in half:
            self._parameters[name].data = self._parameters[name].data.float()
        for owner in {name.rpartition(".")[0] for name in half}:
            model.get_submodule(owner).register_forward_pre_hook(_in_float32)
        loaded = self.read()
        self._loaded = {name: loaded[name] for name in names if name not in new}
        self._first = self.initial(0)
        self.reset()

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """The checkpoint's values; what it lacks is drawn from the seed."""
        lacking = {name: self.shapes[name] for name in self.shapes if name not in self._loaded}
        drawn = draw_head(lacking, seed)
        return {
            name: drawn[name] if name in drawn else self._loaded[name].copy()
            for name in self.shapes
        }

    def write(self, head: Head) -> None:
        """Copy the values in; AdapterError where names or shapes are not those of this model."""
        if odd := set(head_shapes(head).items()) ^ set(self.shapes.items()):
            raise AdapterError(f"the head differs from the base model's in {listing(sorted(odd))}")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(np.array(head[name], np.float32)))

    def reset(self) -> None:
        """Back to the initial head of seed 0."""
        self.write(self._first)

    def read(self) -> dict[str, FloatArray]:
        """A copy of the values as they stand."""
        return {
            name: parameter.detach().float().cpu().numpy().copy()
            for name, parameter in self._parameters.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """All of them, to be trained."""
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        return list(self._parameters.values())

    def freeze(self) -> None:
        """No gradients, and none left over."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hidden states that a base in half precision hands to its head."""
    return tuple(value.float() if torch.is_tensor(value) else value for value in inputs)


class LoraSlot:
    """The LoRA layers of one adapter, of any rank, with the head that trains beside them.

    Its factors are parameters of their own, in float32 whatever the base is in, and go when the
    slot is emptied.
    """

    def __init__(self, name: str, layers: Mapping[str, Any], head: HeadSlot) -> None:
        self.name = name
        self.layers = layers
        """PEFT's LoRA layer around each target module."""
        self._head = head
        self.empty()

    def write(self, adapter: Adapter, dropout: float = 0.0) -> None:
        """Put the factors in; the layer's scaling becomes the adapter's scale.

        dropout: on the input of A while the model is in training mode.
        """
        for target, layer in self.layers.items():
            factors = adapter[target]
            device = layer.get_base_layer().weight.device
            for half, values in ((layer.lora_A, factors.a), (layer.lora_B, factors.b)):
                matrix = torch.tensor(np.ascontiguousarray(values), device=device)
                half[self.name].weight = nn.Parameter(matrix, requires_grad=False)
            layer.r[self.name] = factors.rank
            layer.scaling[self.name] = factors.scale
            layer.lora_dropout[self.name] = nn.Dropout(dropout) if dropout else nn.Identity()
            layer.enable_adapters(True)

    def empty(self) -> None:
        """Free the factors; the layers compute the base alone."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
            for half in (layer.lora_A, layer.lora_B):
                half[self.name].weight = nn.Parameter(torch.empty(0, 0), requires_grad=False)

    def read(self) -> Adapter:
        """A copy of the factors as they stand."""
        modules = {}
        for target, layer in self.layers.items():
            a, b = (
                half[self.name].weight.detach().float().cpu().numpy().copy()
                for half in (layer.lora_A, layer.lora_B)
            )
            modules[target] = Factors(a, b, float(layer.scaling[self.name]))
        return Adapter(modules)

    def read_head(self) -> dict[str, FloatArray]:
        """A copy of the head's values as they stand; empty where there is none."""
        return self._head.read()

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(A, B) of each module, whichever of them train."""
        return [
            (layer.lora_A[self.name].weight, layer.lora_B[self.name].weight)
            for layer in self.layers.values()
        ]

    def parameters(self, trains: str) -> list[nn.Parameter]:
        """The factors to train, `A`, `B` or `both`, and behind them the head's parameters.

        The other factors of this slot stay frozen.
        """
        chosen: list[nn.Parameter] = []
        for layer in self.layers.values():
            for half, letter in ((layer.lora_A, "A"), (layer.lora_B, "B")):
                weight = half[self.name].weight
                weight.requires_grad_(trains in (letter, "both"))
                chosen += [weight] if weight.requires_grad else []
        return chosen + self._head.parameters()

    def freeze(self) -> None:
        """No gradients, and none left over."""
        for layer in self.layers.values():
            for half in (layer.lora_A, layer.lora_B):
                half[self.name].weight.requires_grad_(False)
                half[self.name].weight.grad = None
        self._head.freeze()
