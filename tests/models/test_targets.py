"""What LoRA goes into, by model: text models of several senses, and layers that PEFT refuses."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters.peft_files import write_peft
from client.training import train
from core.errors import UsageError
from models.base_model import load_base_model
from tools.rehearsal.tiny_models import (
    CONTEXT,
    open_model,
    random_adapter,
    random_examples,
    save_gemma3,
    save_llama,
    save_mamba,
    settings_for,
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemma3(tmp_path_factory.mktemp("models") / "gemma3")


def test_of_a_checkpoint_that_also_sees_the_text_model_is_adapted(gemma: Path) -> None:
    tuned = open_model(gemma)
    assert type(tuned.model).__name__ == "Gemma3ForConditionalGeneration"
    assert len(tuned.targets) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in tuned.targets)
    assert tuned.left_out == (
        "all-linear leaves out 9 linear layers beside the text model (vision_tower)"
    )
    assert tuned.base.context == CONTEXT
    named = open_model(gemma, "q_proj")
    assert named.targets == [f"model.language_model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    with pytest.raises(UsageError, match="'fc1' matches no linear layer of this model"):
        open_model(gemma, "fc1")


def test_such_a_text_model_trains_and_its_export_is_loaded_by_plain_peft(
    gemma: Path, tmp_path: Path
) -> None:
    settings = settings_for(gemma, local__learning_rate=1e-2, local__max_steps=6)
    tuned = open_model(gemma)
    start = random_adapter(tuned, 2, size=0.1)
    examples = random_examples(tuned, 8)
    with tuned.adapted(start):
        before = tuned.evaluate(examples).loss
    trained = train(tuned, examples, start, settings.local, seed=1)
    write_peft(trained.adapter, tmp_path / "adapter", str(gemma))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(gemma), tmp_path / "adapter"
    ).eval()
    ids = torch.arange(8, 40)[None]
    with tuned.adapted(trained.adapter), torch.no_grad():
        assert tuned.evaluate(examples).loss < before
        found, wanted = tuned.model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_identity_of_such_a_base_is_that_of_its_values(gemma: Path, tmp_path: Path) -> None:
    half = save_gemma3(tmp_path / "half", dtype="bfloat16")
    whole = tmp_path / "whole"
    transformers.Gemma3ForConditionalGeneration.from_pretrained(
        half, dtype=torch.float32
    ).save_pretrained(whole)
    transformers.AutoTokenizer.from_pretrained(half).save_pretrained(whole)
    found = {f: load_base_model(str(f), "float32", "cpu").identity for f in (half, whole, gemma)}
    assert found[half] == found[whole] != found[gemma]


def test_a_classifier_of_such_a_checkpoint_adapts_the_text_model_too(gemma: Path) -> None:
    tuned = open_model(gemma, labels=("yes", "no"))
    assert len(tuned.targets) == 2 * 7
    assert all("language_model.layers." in name for name in tuned.targets)


def test_what_peft_refuses_is_refused_at_once(tmp_path: Path) -> None:
    folder = save_mamba(tmp_path / "mamba")
    expected = (
        r"lora.target-modules=all-linear asks for out_proj, which PEFT refuses in a model of type "
        r"mamba: .* Name others: dt_proj, in_proj, x_proj"
    )
    with pytest.raises(UsageError, match=expected):
        open_model(folder)
    with pytest.raises(UsageError, match=r"asks for out_proj, .* Name others: it has none"):
        open_model(folder, "out_proj")
    assert open_model(folder, "in_proj").targets == ["backbone.layers.0.mixer.in_proj"]


def test_asking_peft_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert [*open_model(folder).model.state_dict()] == [*plain.state_dict()]
