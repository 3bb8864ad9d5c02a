"""A base in 8 or 4 bits, by bitsandbytes: how it is loaded, and what its layers hold.

    int8   LLM.int8() (Dettmers et al., NeurIPS 2022): one scale for each row of W
    nf4    QLoRA's NormalFloat (Dettmers et al., NeurIPS 2023): one scale for every 64 values

What is not quantized (embeddings, norms, the output layer) is in model.dtype, and so are the
activations.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from core.errors import UsageError

NONE = "none"


def quantization_config(
    quantization: str, dtype: torch.dtype, whole: Sequence[str] | None = None
) -> Any:
    """What `from_pretrained` takes as quantization_config; None where nothing is quantized.

    whole: modules that stay as they are; None: the output layer.

    Raises UsageError where the library is not installed.
    """
    if quantization == NONE:
        return None
    refuse_without_library(f"model.quantization={quantization}")
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )


def unpacked_modules(config: Any) -> list[str]:
    """The modules of a classifier that may have to train: its head, and a pooler in its base."""
    with torch.device("meta"):
        shell = transformers.AutoModelForSequenceClassification.from_config(config)
    base = shell.base_model_prefix
    return [name for name, _ in shell.named_children() if name != base] + ["pooler"]


def refuse_without_library(what: str) -> None:
    """UsageError where bitsandbytes is missing; `what` needs it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{what} needs the library bitsandbytes, which is not installed: "
            "pip install 'bouquet[quantization]', or pip install bitsandbytes"
        )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed in fewer bits than a float.

    >>> is_quantized(nn.Linear(2, 3))
    False
    """
    weight = layer.weight
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def settle(model: nn.Module) -> None:
    """Make quantized layers compute alike in training and evaluation: from W in the base's dtype.

    On a CPU bitsandbytes does so in training only. In evaluation it rounds activations as well: of
    int8 by columns that depend on what else lies in the batch; of nf4, where the CPU has bfloat16,
    after repacking the weights in place, whose scales are then rounded for good.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer.train()


def float32_weight(layer: nn.Module) -> torch.Tensor:
    """W of a linear layer, (m, n), in float32, whatever it is held in."""
    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:  # nf4
        from bitsandbytes.functional import dequantize_4bit

        unpacked: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state).float()
        return unpacked
    if is_quantized(layer):  # int8: row i is its codes times SCB[i] / 127
        state: Any = layer.state
        scales = state.SCB if state.SCB is not None else weight.SCB  # moves at the first product
        restored: torch.Tensor = weight.detach().float() * (scales.float() / 127.0)[:, None]
        return restored
    whole: torch.Tensor = weight.detach().float()
    return whole.T if isinstance(layer, Conv1D) else whole


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(m, n) of a linear layer: outputs and inputs, not the shape of packed storage.

    >>> shape_of(nn.Linear(2, 3)), shape_of(Conv1D(3, 2))
    ((3, 2), (3, 2))
    """
    if isinstance(layer, Conv1D):  # holds W transposed
        return int(layer.nf), int(layer.weight.shape[0])
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
