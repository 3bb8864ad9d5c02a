"""How much memory a site's training takes: an estimate, to tell "fits" from "cannot fit".

weights       the frozen base, and what each round's global model adds to it: a copy of the adapted
              matrices, the pristine base, where it is written into them; else a branch beside them
adapter       factors, gradients and AdamW's two moments, all float32: 16 bytes a parameter
activations   inputs and outputs of each adapted layer and the logits that are held at once, for one
              batch; local.checkpointing takes less
"""

from collections.abc import Mapping
from dataclasses import dataclass

ADAPTER_BYTES = 16
LOGIT_COPIES = 3
"""Logits, their float32 softmax, and its gradient."""
LAYER_COPIES = 3
"""What attention, norms and non-linearities keep beside the adapted layers' own inputs."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part."""

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.adapter + self.activations


def estimate_memory(
    shapes: Mapping[str, tuple[int, int]],
    weight_bytes: int,
    value_bytes: int,
    logits: int,
    rank: int,
    tokens: int,
    beside: int = 0,
) -> MemoryEstimate:
    """Peak memory of training.

    shapes: module -> (m, n) of each adapted matrix.
    weight_bytes, value_bytes: of the whole base model, and of one of its values.
    logits: how many are held at once.
    tokens: of one batch, all examples together.
    beside: rank of the global model where it lies beside the base; 0: it is written into it.

    >>> estimate_memory({"q": (10, 10)}, 4000, 4, 0, rank=2, tokens=0)
    MemoryEstimate(weights=4400, adapter=640, activations=0)
    >>> estimate_memory({"q": (10, 10)}, 1000, 4, 0, rank=2, tokens=0, beside=3).weights
    1240
    """
    sizes = [min(m * n, beside * (m + n)) if beside else m * n for m, n in shapes.values()]
    parameters = rank * sum(m + n for m, n in shapes.values())
    kept = LAYER_COPIES * sum(m + n for m, n in shapes.values()) * value_bytes
    return MemoryEstimate(
        weights=weight_bytes + 4 * sum(sizes),
        adapter=parameters * ADAPTER_BYTES,
        activations=tokens * kept + LOGIT_COPIES * logits * 4,
    )
