"""Frozen weights in bfloat16 while a client trains in it.

Autocast keeps the bfloat16 copy of a weight that trains, but makes that of a frozen one anew at
each forward pass. Here it is made once, with the same rounding: training gives the same bits.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_in_bfloat16(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within this context frozen float32 matrices of linear layers are held in bfloat16.

    Only to be used under autocast. A matrix that another layer shares stays as it is, for that
    layer may be one that autocast leaves in float32, such as an embedding. So do LoRA factors.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    whole: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if not enabled or not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        weight = module.weight
        if not weight.requires_grad and weight.dtype == torch.float32 and uses[id(weight)] == 1:
            whole.append((weight, weight.data))
            weight.data = weight.data.to(torch.bfloat16)
    try:
        yield
    finally:
        for weight, data in whole:
            weight.data = data
