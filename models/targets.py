"""What LoRA goes into: the linear layers that were asked for, and matrices that are no layers.

The experts of a mixture are one parameter (experts, m, n) of which each expert's matrix is a slice.
`lora.target-parameters` names such parameters; models/expert_matrices.py makes a linear layer of
each slice, so that everything else treats them like any other.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from core.errors import UsageError, listing, nearest

ALL_LINEAR = "all-linear"


def find_target_modules(model: Any, targets: str, head: Collection[str] = ()) -> list[str]:
    """Full names of the linear layers that `lora.target-modules` asks for, sorted.

    targets: `all-linear` (every linear layer but the output head), or names with commas; a name
    stands for every layer that it is the last part of. Of a model that also sees or hears only the
    text model's layers count.
    head: parameters that train whole, so that their layers are no targets.

    Raises UsageError for a name that matches no linear layer, with the nearest ones, and for a
    layer that PEFT refuses.
    """
    text = text_part(model)
    linear = [name for name in _linear_layers(model, head) if name.startswith(text)]
    found = set(linear)
    if targets.strip() != ALL_LINEAR:
        found = set()
        for target in (part.strip() for part in targets.split(",")):
            found |= _matching(target, linear, "lora.target-modules", "linear layer")
    if refused := _refused_by_peft(model, sorted(found)):
        kind, reason = next(iter(refused.items()))
        others = sorted({name.rpartition(".")[2] for name in found} - set(refused))
        raise UsageError(
            f"lora.target-modules={targets} asks for {kind}, which PEFT refuses in a model of type "
            f"{model.config.model_type}: {reason} Name others: {listing(others) or 'it has none'}"
        )
    return sorted(found)


def _matching(target: str, names: Sequence[str], key: str, what: str) -> set[str]:
    """The names that end in this one; UsageError with the nearest where there are none."""
    matches = {name for name in names if name == target or name.endswith(f".{target}")}
    if not matches or not target:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        near = nearest(target, kinds, limit=3, cutoff=0.3) or kinds
        raise UsageError(
            f"{key}: {target!r} matches no {what} of this model; the nearest are {listing(near)}."
            + (f" All of them: {ALL_LINEAR}." if key == "lora.target-modules" else "")
        )
    return matches


def text_part(model: Any) -> str:
    """What the names of the text model's modules begin with; empty where it is all of the model.

    A checkpoint that also sees or hears holds its text model beside towers that no text reaches.
    """
    if model.config.get_text_config() is model.config:
        return ""
    text = model.get_decoder()
    return next((f"{name}." for name, m in model.named_modules() if m is text and name), "")


def _linear_layers(model: Any, head: Collection[str]) -> list[str]:
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and f"{name}.weight" not in head
    ]


def _refused_by_peft(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Last part of a name -> why PEFT puts no LoRA into such a layer of such a model.

    PEFT itself is asked, once for each kind of layer, with a shell around the layer alone.
    """
    refused: dict[str, str] = {}
    asked: set[tuple[type, str]] = set()
    for name in names:
        layer, last = model.get_submodule(name), name.rpartition(".")[2]
        if (type(layer), last) in asked:
            continue
        asked.add((type(layer), last))
        shell = nn.Module()
        shell.config = model.config
        shell.add_module(last, layer)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=[last]), shell)
        except ValueError as error:
            refused[last] = str(error).strip().splitlines()[0]
    return refused


def left_out(model: Any, targets: str, parameters: Sequence[str], head: Collection[str]) -> str:
    """What `all-linear` does not reach, for the head of the run; empty where that is nothing.

    parameters: full names of those that lora.target-parameters asks for.
    """
    if targets.strip() != ALL_LINEAR:
        return ""
    parts = []
    matrices = {n: count for n, count in expert_parameters(model) if n not in parameters}
    if matrices:
        kinds = sorted({_kind(name) for name in matrices})
        parts.append(
            f"{sum(matrices.values()):,} expert matrices ({listing(kinds, limit=3)}): name them "
            "with lora.target-parameters"
        )
    text = text_part(model)
    if beside := [name for name in _linear_layers(model, head) if not name.startswith(text)]:
        where = sorted({name.removeprefix("model.").partition(".")[0] for name in beside})
        parts.append(f"{len(beside):,} linear layers beside the text model ({listing(where)})")
    return f"{ALL_LINEAR} leaves out {'; and '.join(parts)}" if parts else ""


def expert_parameters(model: Any) -> Iterator[tuple[str, int]]:
    """(full name, experts) of each parameter that holds one matrix for each expert."""
    text = text_part(model)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) or not module_name.startswith(text):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and parameter.is_floating_point():
                yield f"{module_name}.{name}", int(parameter.shape[0])


def find_target_parameters(model: Any, targets: Sequence[str]) -> list[str]:
    """Full names of the experts' parameters that `lora.target-parameters` asks for, sorted.

    Raises UsageError for a name that matches none, with the nearest ones.
    """
    names = [name for name, _ in expert_parameters(model)]
    if targets and not names:
        raise UsageError(
            f"lora.target-parameters={','.join(targets)}, but this model has no experts whose "
            "matrices are one parameter: its linear layers are reached by lora.target-modules"
        )
    found: set[str] = set()
    for target in targets:
        found |= _matching(target, names, "lora.target-parameters", "parameter of experts")
    return sorted(found)


def _kind(name: str) -> str:
    """What follows the number of the layer.

    >>> _kind("model.layers.0.mlp.experts.gate_up_proj")
    'mlp.experts.gate_up_proj'
    """
    parts = name.split(".")
    at = max((k + 1 for k, part in enumerate(parts[:-1]) if part.isdigit()), default=0)
    return ".".join(parts[at:])
