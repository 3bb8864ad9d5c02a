"""Each expert's matrix of a mixture as a linear layer, which PEFT adapts like any other.

    experts.gate_up_proj (E, m, n)   ->   experts.matrices.0.gate_up_proj.0 ... E-1, each (m, n)

The number before the parameter's name is its place among such parameters of its module: PEFT nests
the adapters of several parameters of one module in that order (adapters/expert_names.py). What the
experts compute with is put together anew at each access: every layer's weight, and the deltas of
the adapters that are active in it. The layers' weights are slices of the parameter, not copies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from adapters.expert_names import MATRICES, matrix_name


def as_matrices(model: Any, parameters: Sequence[str]) -> list[str]:
    """Make linear layers of these parameters (full names); the layers' names, sorted.

    A parameter is (experts, m, n), or (experts, n, m) where the module says `is_transposed`.
    """
    chosen = [name.rpartition(".") for name in parameters]
    places = {module: _stacked(model.get_submodule(module)) for module, _, _ in chosen}
    names = []
    for module, _, name in chosen:
        experts, place = model.get_submodule(module), places[module].index(name)
        transposed = bool(getattr(experts, "is_transposed", False))
        layers = nn.ModuleList(
            _linear(matrix.T if transposed else matrix) for matrix in getattr(experts, name).data
        )
        if not hasattr(experts, MATRICES):
            experts.add_module(MATRICES, nn.ModuleDict())
        experts.get_submodule(MATRICES)[str(place)] = nn.ModuleDict({name: layers})
        adapted = _Adapted(layers, transposed)
        parametrize.register_parametrization(experts, name, adapted, unsafe=True)
        experts.register_forward_pre_hook(adapted.begin)
        experts.register_forward_hook(adapted.end, always_call=True)
        names += [matrix_name(module, place, name, expert) for expert in range(len(layers))]
    return sorted(names)


def _stacked(experts: nn.Module) -> list[str]:
    """The parameters of a module that hold a matrix for each expert, in its order."""
    owned = experts.named_parameters(recurse=False)
    return [name for name, parameter in owned if parameter.ndim == 3]


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A frozen linear layer with this very memory as its weight, (m, n)."""
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class _Adapted(nn.Module):
    """The parameter as the experts see it: the layers' weights with their active adapters.

    Put together once in a forward pass of the experts, however often they look at it.
    """

    def __init__(self, layers: nn.ModuleList, transposed: bool) -> None:
        super().__init__()
        self._layers = (layers,)  # in a tuple: they are modules of the experts, not of this
        self._slices = [layer.weight.data_ptr() for layer in layers]  # type: ignore[operator]
        self._transposed = transposed
        self._keeps = False
        self._kept: list[torch.Tensor] = []

    def begin(self, experts: nn.Module, inputs: object) -> None:
        """The experts' forward pass begins."""
        self._keeps = True

    def end(self, experts: nn.Module, inputs: object, output: object) -> None:
        """It has ended."""
        self._keeps, self._kept = False, []

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """(experts, m, n), or (experts, n, m) where transposed."""
        if self._kept:
            return self._kept[0]
        whole = self._whole(parameter)
        if self._keeps:
            self._kept.append(whole)
        return whole

    def _whole(self, parameter: torch.Tensor) -> torch.Tensor:
        layers: list[Any] = list(self._layers[0])
        weights = [getattr(layer, "base_layer", layer).weight for layer in layers]
        whole = parameter
        if [weight.data_ptr() for weight in weights] != self._slices:  # no slices any more
            whole = torch.stack([w.T if self._transposed else w for w in weights])
            whole = whole.to(parameter.dtype)
        for name in _active(layers[0]):
            a = torch.stack([layer.lora_A[name].weight for layer in layers])  # (E, r, n)
            b = torch.stack([layer.lora_B[name].weight for layer in layers])  # (E, m, r)
            scales = a.new_tensor([layer.scaling[name] for layer in layers])
            delta = torch.bmm(b * scales[:, None, None], a)
            whole = whole + (delta.mT if self._transposed else delta).to(whole.dtype)
        return whole


def _active(layer: Any) -> list[str]:
    """The adapters that take part in this layer's forward pass."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]
