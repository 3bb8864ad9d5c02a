"""Frozen weights in bfloat16 give the same bits as autocast alone, and come back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import client.training
from client.frozen import frozen_in_bfloat16
from client.training import train
from tests.client.test_training import SEED, local, same_bytes
from tools.rehearsal.tiny_models import open_model, random_adapter, random_examples


@contextmanager
def as_it_is(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    yield


@pytest.mark.parametrize("trains", ["both", "A", "B"])
def test_training_gives_the_bits_of_autocast_alone(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, trains: str
) -> None:
    tuned = open_model(llama_folder)
    tuned.merge(random_adapter(tuned, 5))
    examples, start = random_examples(tuned, 8), random_adapter(tuned, 3)
    settings = local(precision="bfloat16", epochs=2)
    once = train(tuned, examples, start, settings, SEED, trains)
    monkeypatch.setattr(client.training, "frozen_in_bfloat16", as_it_is)
    each_time = train(tuned, examples, start, settings, SEED, trains)
    assert once.loss == each_time.loss
    assert same_bytes(once.adapter, each_time.adapter)


def test_what_is_rounded_and_that_it_comes_back(llama_folder: Path) -> None:
    tuned = open_model(llama_folder)
    with tuned.adapted(random_adapter(tuned, 3)):
        before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
        with frozen_in_bfloat16(tuned.model):
            rounded = {
                name for name, p in tuned.model.named_parameters() if p.dtype == torch.bfloat16
            }
        after = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    assert any(name.endswith("q_proj.base_layer.weight") for name in rounded)
    assert not any("lora_" in name or "embed" in name or "norm" in name for name in rounded)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_shared_matrix_and_one_that_trains_stay_in_float32() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(6, 4), "out": nn.Linear(4, 6), "head": nn.Linear(4, 4)}
    )
    model["out"].weight = model["embedding"].weight
    model.requires_grad_(False)
    model["head"].requires_grad_()
    with frozen_in_bfloat16(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    model["head"].requires_grad_(False)
    with frozen_in_bfloat16(model, enabled=False):
        assert model["head"].weight.dtype == torch.float32
    with frozen_in_bfloat16(model):
        assert model["head"].weight.dtype == torch.bfloat16
        assert model["out"].weight.dtype == torch.float32
