"""Whatever a base is held in, what trains is float32: factors, gradients and optimizer state."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.adapter import draw
from client.training import train
from core.errors import BouquetError
from tests.client.test_training import SEED, local, same_bytes
from tools.rehearsal.tiny_models import (
    FORMATS,
    open_format,
    open_model,
    random_adapter,
    random_examples,
)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_factors_gradients_and_moments_are_float32(
    name: str, precision: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    gradients: set[torch.dtype] = set()

    class Watched(torch.optim.AdamW):
        def __init__(self, *args: object, **more: object) -> None:
            super().__init__(*args, **more)  # type: ignore[arg-type]
            made.append(self)

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            parameters = self.param_groups[0]["params"]
            gradients.update(p.grad.dtype for p in parameters)
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    tuned = open_format(llama_folder, name)
    tuned.merge(random_adapter(tuned, 2))
    start = draw(tuned.shapes, 4, seed=0, scale=2.0)
    examples = random_examples(tuned, 16)
    before = tuned.evaluate_global(None, start, examples).loss
    tuned.merge(None)
    trained = train(tuned, examples, start, local(epochs=3, precision=precision), SEED)
    (optimizer,) = made
    parameters = optimizer.param_groups[0]["params"]
    seconds = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
    assert {p.dtype for p in parameters} == gradients == {torch.float32}
    assert {second.dtype for second in seconds} == {torch.float32}
    zeros = sum(int((second == 0).sum()) for second in seconds)
    assert zeros < 0.001 * sum(second.numel() for second in seconds)
    assert tuned.evaluate_global(None, trained.adapter, examples).loss < before - 0.5


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8", "nf4"])
def test_training_over_what_is_merged_leaves_the_base_to_the_bit(
    name: str, llama_folder: Path
) -> None:
    tuned = open_format(llama_folder, name)
    merged, start = random_adapter(tuned, 3), draw(tuned.shapes, 4, seed=0, scale=2.0)
    examples = random_examples(tuned, 8)

    def base() -> dict[str, torch.Tensor]:
        return {
            key.replace(".base_layer", ""): value.clone()
            for key, value in tuned.model.state_dict().items()
            if "lora_" not in key
        }

    before = base()
    alone = train(tuned, examples, start, local(), SEED)
    tuned.merge(merged)
    tuned.evaluate(examples)
    over = train(tuned, examples, start, local(), SEED)
    assert abs(over.loss - alone.loss) > 1e-3
    tuned.merge(None)
    again = train(tuned, examples, start, local(), SEED)
    assert same_bytes(again.adapter, alone.adapter)
    after = base()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_gradients_in_float16_neither_vanish_nor_are_changed_in_size(llama_folder: Path) -> None:
    """A mean over many tokens: each logit's share of the gradient is below what float16 holds."""
    half, exact = (open_model(llama_folder, dtype=dtype) for dtype in ("float16", "float32"))
    start, examples = random_adapter(exact, 3), random_examples(exact, 64, lengths=(60,))
    settings = local(batch_size=64, learning_rate=1e-3)
    moments = [train(t, examples, start, settings, SEED, moments={}).moments for t in (half, exact)]
    for name, wanted in moments[1].items():
        if name.endswith("exp_avg"):
            error = np.linalg.norm(moments[0][name] - wanted) / np.linalg.norm(wanted)
            assert error < 0.03


def test_a_gradient_that_overflows_float16_is_refused_with_a_way_out(llama_folder: Path) -> None:
    tuned = open_model(llama_folder, dtype="float16")
    start = random_adapter(tuned, 3, size=3e3)
    with pytest.raises(
        BouquetError,
        match=r"^a gradient overflowed in float16: take model.dtype=bfloat16 or float32$",
    ):
        train(tuned, random_examples(tuned, 8), start, local(), SEED)
