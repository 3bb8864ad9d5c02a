"""A base in 8 or 4 bits: its identity, what it needs, and that it computes alike everywhere."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.adapter import draw
from client.training import train
from core.errors import UsageError
from settings.run import run_settings
from tests.client.test_training import SEED, local
from tools.rehearsal.tiny_models import (
    FORMATS,
    open_format,
    open_model,
    random_adapter,
    random_examples,
    random_texts,
)

QUANTIZED = ["int8", "nf4"]


def test_the_identity_includes_the_number_format(llama_folder: Path) -> None:
    first = {name: open_format(llama_folder, name).base.identity for name in FORMATS}
    assert len(set(first.values())) == len(FORMATS)
    (llama_folder / ".bouquet-identity.json").unlink()  # computed anew, not looked up
    again = {name: open_format(llama_folder, name).base.identity for name in reversed(FORMATS)}
    assert again == first


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_only_linear_layers_are_packed(quantization: str, llama_folder: Path) -> None:
    tuned = open_model(llama_folder, dtype="bfloat16", quantization=quantization)
    kinds = {
        name: value.dtype for name, value in tuned.model.named_parameters() if "lora" not in name
    }
    packed = {name for name, dtype in kinds.items() if not dtype.is_floating_point}
    assert packed == {f"{name}.weight" for name in tuned.targets}
    assert {kinds[name] for name in set(kinds) - packed} == {torch.bfloat16}


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_examples_loss_does_not_depend_on_what_else_lies_in_its_batch(
    name: str, llama_folder: Path
) -> None:
    tuned = open_format(llama_folder, name)
    with torch.no_grad():  # activations far from 0, which LLM.int8() would treat by the column
        tuned.model.get_parameter("model.norm.weight").mul_(3.0)
        for layer in tuned.model.model.layers:
            layer.input_layernorm.weight.mul_(5.0)
    examples = random_examples(tuned, 12)
    together = tuned.evaluate(examples, 12 * 64).loss
    apart = tuned.evaluate(examples, 1).loss
    assert apart == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("name", QUANTIZED)
def test_training_mode_computes_what_evaluation_does(name: str, llama_folder: Path) -> None:
    tuned = open_format(llama_folder, name)
    batch = tuned.batch(random_examples(tuned, 6))
    with tuned.adapted(random_adapter(tuned, 3)):
        tuned.model.train()
        training = tuned.loss_sum(batch)
        tuned.model.eval()
        with torch.no_grad():
            evaluation = tuned.loss_sum(batch)
    assert training.item() == pytest.approx(evaluation.item(), rel=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_classifier_over_a_quantized_base_trains_its_head_in_float32(
    model: str, quantization: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{model}_folder")
    tuned = open_model(folder, labels=("a", "b", "c"), quantization=quantization)
    assert any(not p.dtype.is_floating_point for p in tuned.model.parameters())
    texts, head = random_texts(tuned, 12), tuned.initial_head(1)
    start = draw(tuned.shapes, 4, seed=0, scale=2.0)
    before = tuned.evaluate_global(None, None, texts, head).loss
    trained = train(tuned, texts, start, local(epochs=10), SEED, head=head)
    assert {value.dtype for value in trained.head.values()} == {np.dtype(np.float32)}
    after = tuned.evaluate_global(None, trained.adapter, texts, trained.head).loss
    assert after < before - 0.2


def test_without_the_library_one_message_says_what_to_install(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(
        UsageError,
        match=r"^model.quantization=nf4 needs the library bitsandbytes, which is not installed: "
        r"pip install 'bouquet\[quantization\]', or pip install bitsandbytes$",
    ):
        open_model(llama_folder, quantization="nf4")


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_checkpoint_that_is_quantized_already_is_taken_as_it_is(
    name: str, llama_folder: Path, tmp_path: Path
) -> None:
    here = open_format(llama_folder, name)
    here.model.save_pretrained(tmp_path / "packed")
    here.base.tokenizer.save_pretrained(tmp_path / "packed")
    there = open_model(tmp_path / "packed")
    examples, merged = random_examples(here, 8), random_adapter(here, 3)
    assert there.shapes == here.shapes
    found, wanted = (tuned.evaluate_global(merged, None, examples) for tuned in (there, here))
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_bfloat16_arithmetic_over_a_float16_base_is_refused_at_the_door() -> None:
    layer = {"model.dtype": "float16", "local.precision": "bfloat16"}
    with pytest.raises(
        UsageError,
        match=r"^local.precision=bfloat16 does not go with model.dtype=float16, whose weights it "
        r"would round: take model.dtype=bfloat16, or leave local.precision=auto$",
    ):
        run_settings(layer)
