"""What trains beside the LoRA factors: a new classification head, as named arrays.

A head is averaged by p_k under every strategy. It travels in safetensors form like the adapter,
and is checked like one.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from adapters.adapter import FloatArray

Head: TypeAlias = Mapping[str, FloatArray]
"""Parameter name (`classifier.weight`) -> its values, float32."""
HeadShapes: TypeAlias = Mapping[str, tuple[int, ...]]

SPREAD = 0.02


def draw_head(shapes: HeadShapes, seed: int) -> dict[str, FloatArray]:
    """A fresh head: matrices normal with standard deviation 0.02, biases 0, norm weights 1.

    The same seed gives the same head on every platform, each array from its own stream.

    >>> head = draw_head({"classifier.bias": (2,), "classifier.weight": (2, 3)}, seed=0)
    >>> float(head["classifier.bias"].max()), head["classifier.weight"].shape
    (0.0, (2, 3))
    """
    head = {}
    for name, shape in shapes.items():
        stream = np.random.default_rng([seed, *name.encode()])
        drawn = SPREAD * stream.standard_normal(shape, dtype=np.float32)
        still = np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        head[name] = drawn if len(shape) > 1 else still
    return head


def mean_of_heads(heads: Sequence[Head], weights: Sequence[float]) -> dict[str, FloatArray]:
    """sum_k p_k head_k, array by array, summed in float64.

    >>> one, three = ({"bias": np.full(2, value, np.float32)} for value in (1.0, 3.0))
    >>> mean_of_heads([one, three], [0.5, 0.5])["bias"].tolist()
    [2.0, 2.0]
    """
    return {
        name: np.asarray(
            sum(w * head[name].astype(np.float64) for head, w in zip(heads, weights, strict=True)),
            np.float32,
        )
        for name in heads[0]
    }


def head_shapes(head: Head) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: values.shape for name, values in head.items()}
