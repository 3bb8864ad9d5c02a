"""How much memory a site's training takes: an estimate, to tell "fits" from "cannot fit".

weights       the frozen base, and a copy of the adapted matrices (the pristine base to which
              each round's global model is added)
adapter       factors, gradients and AdamW's two moments, all float32: 16 bytes a parameter
activations   inputs and outputs of each adapted layer and the logits, for one batch
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
    vocabulary: int,
    rank: int,
    tokens: int,
) -> MemoryEstimate:
    """Peak memory of training.

    shapes: module -> (m, n) of each adapted matrix.
    weight_bytes, value_bytes: of the whole base model, and of one of its values.
    tokens: of one batch, all examples together.

    >>> estimate_memory({"q": (10, 10)}, 4000, 4, 0, rank=2, tokens=0)
    MemoryEstimate(weights=4400, adapter=640, activations=0)
    """
    pristine = sum(m * n for m, n in shapes.values()) * value_bytes
    parameters = rank * sum(m + n for m, n in shapes.values())
    kept = LAYER_COPIES * sum(m + n for m, n in shapes.values()) * value_bytes
    logits = LOGIT_COPIES * vocabulary * 4
    return MemoryEstimate(
        weights=weight_bytes + pristine,
        adapter=parameters * ADAPTER_BYTES,
        activations=tokens * (kept + logits),
    )
