"""Activations computed again: the same gradients to the bit, and less that is kept for them."""

from pathlib import Path

import pytest
import torch

from client.training import train
from core.errors import UsageError
from tasks import token_loss
from tests.client.test_training import SEED, local, same_bytes
from tools.rehearsal.tiny_models import open_format, open_model, random_adapter, random_examples


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("at_once", [1 << 24, 2000])
def test_it_trains_the_same_adapter_to_the_bit(
    dropout: float, at_once: int, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", at_once)
    tuned = open_model(model_folder)
    examples, start = random_examples(tuned, 12), random_adapter(tuned, 3)
    kept, again = (
        train(tuned, examples, start, local(checkpointing=checkpointing), SEED, "both", dropout)
        for checkpointing in (False, True)
    )
    assert again.loss == kept.loss
    assert same_bytes(again.adapter, kept.adapter)
    assert not tuned.model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["bfloat16", "nf4"])
def test_it_goes_with_what_lies_beside_the_base(name: str, llama_folder: Path) -> None:
    tuned = open_format(llama_folder, name)
    tuned.merge(random_adapter(tuned, 4, seed=2))
    examples, start = random_examples(tuned, 12), random_adapter(tuned, 3)
    kept, again = (
        train(tuned, examples, start, local(checkpointing=checkpointing), SEED, "both", 0.2)
        for checkpointing in (False, True)
    )
    assert again.loss == kept.loss
    assert same_bytes(again.adapter, kept.adapter)


def test_it_keeps_less_for_the_backward_pass(model_folder: Path) -> None:
    tuned = open_model(model_folder)
    batch = tuned.batch(random_examples(tuned, 16, lengths=(60,)))
    kept = {}
    for enabled in (False, True):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with tuned.adapted(random_adapter(tuned, 3)) as slot, tuned.checkpointed(enabled):
            assert slot is not None
            slot.parameters("both")
            tuned.model.train()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                tuned.loss_sum(batch)
        kept[enabled] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_a_model_that_cannot_is_refused(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = open_model(llama_folder)
    monkeypatch.setattr(type(tuned.model), "supports_gradient_checkpointing", False)
    with pytest.raises(
        UsageError,
        match=r"^local.checkpointing is set, but LlamaForCausalLM cannot compute its activations "
        r"again: set it to false, and a smaller local.batch-size$",
    ):
        train(
            tuned,
            random_examples(tuned, 4),
            random_adapter(tuned, 2),
            local(checkpointing=True),
            SEED,
        )
