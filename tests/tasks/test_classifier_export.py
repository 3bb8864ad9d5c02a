"""What `write_peft` writes of a classifier, PEFT loads to exactly the same logits."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file

from adapters.peft_files import write_peft
from tools.rehearsal.tiny_models import (
    open_model,
    random_adapter,
    random_head,
    random_texts,
    save_bert,
)

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

LABELS = ("neg", "pos", "söso")


@pytest.fixture(params=["bert", "llama", "masked", "sorter"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An encoder, a decoder, an encoder without pooler, and one that has a head already."""
    if request.param == "masked":
        return save_bert(tmp_path / "masked", kind="BertForMaskedLM")
    if request.param == "sorter":
        sorter = "BertForSequenceClassification"
        return save_bert(tmp_path / "sorter", kind=sorter, num_labels=len(LABELS))
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


def by_peft(base: Path, adapter: Path, pad: int) -> Any:
    torch.manual_seed(99)  # so that a head which is not replaced would be another
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(LABELS), dtype=torch.float32
    )
    model.config.pad_token_id = pad
    return PeftModel.from_pretrained(model, adapter).eval()


def test_peft_computes_the_same_logits(folder: Path, tmp_path: Path) -> None:
    tuned = open_model(folder, labels=LABELS)
    adapter, head = random_adapter(tuned, 3), random_head(tuned)
    place = tmp_path / "adapter"
    write_peft(adapter, place, str(folder), head, LABELS)
    batch = tuned.batch(random_texts(tuned, 6))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        with tuned.adapted(adapter, head=head):
            wanted = tuned.model(**inputs).logits
        loaded = by_peft(folder, place, tuned.base.tokenizer.pad_token_id)
        found = loaded(**inputs).logits
        merged = loaded.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1
    with torch.no_grad(), tuned.adapted(adapter):
        assert (tuned.model(**inputs).logits - wanted).abs().max() > 0.1


def test_the_files_name_the_head_and_the_labels(folder: Path, tmp_path: Path) -> None:
    tuned = open_model(folder, labels=LABELS)
    head = random_head(tuned)
    write_peft(random_adapter(tuned, 2), tmp_path / "out", "base", head, LABELS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = {"llama": ["score"], "masked": ["classifier", "pooler"]}
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == expected.get(folder.name, ["classifier"])
    assert not set(config["target_modules"]) & {name.rpartition(".")[0] for name in head}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in head} <= set(tensors)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text(encoding="utf-8"))
    assert labels["id2label"] == {"0": "neg", "1": "pos", "2": "söso"}
    assert labels["label2id"] == {"neg": 0, "pos": 1, "söso": 2}


def test_without_a_head_nothing_is_said_of_one(llama_folder: Path, tmp_path: Path) -> None:
    tuned = open_model(llama_folder)
    adapter = random_adapter(tuned, 2)
    write_peft(adapter, tmp_path / "a", "base")
    write_peft(adapter, tmp_path / "b", "base", head={}, labels=())
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert "modules_to_save" not in config


def test_a_classifier_without_its_head_is_a_classifier(folder: Path, tmp_path: Path) -> None:
    tuned = open_model(folder, labels=LABELS)
    adapter = random_adapter(tuned, 2)
    write_peft(adapter, tmp_path / "out", str(folder), None, LABELS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert "modules_to_save" not in config
    assert (tmp_path / "out" / "labels.json").is_file()
    batch = tuned.batch(random_texts(tuned, 6))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    loaded = by_peft(folder, tmp_path / "out", tuned.base.tokenizer.pad_token_id)
    state = loaded.base_model.model.state_dict()
    head = {name: state[name].numpy() for name in tuned.head_shapes}
    with torch.no_grad(), tuned.adapted(adapter, head=head):
        wanted = tuned.model(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "sorter"])
def test_the_documented_lines_load_a_classifier(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As the page says it, on texts of unlike length, where a decoder must know its padding."""
    if kind == "sorter":  # a checkpoint with a head of another number of labels
        sorter = "BertForSequenceClassification"
        base = save_bert(tmp_path / "sorter", kind=sorter, num_labels=5)
    else:
        base = request.getfixturevalue(f"{kind}_folder")
    tuned = open_model(base, labels=LABELS)
    adapter, head = random_adapter(tuned, 3), random_head(tuned)
    write_peft(adapter, tmp_path / "adapter", str(base), head, LABELS)
    page = (Path(__file__).resolve().parents[2] / "docs" / "compare.md").read_text()
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1].replace("runs/NAME/adapter", str(tmp_path / "adapter")), names)
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    assert model.config.id2label == {0: "neg", 1: "pos", 2: "söso"}
    assert model.config.label2id == {"neg": 0, "pos": 1, "söso": 2}
    inputs = tokenizer(["a short text", "a text of many more words"], padding=True)
    inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        with tuned.adapted(adapter, head=head):
            wanted = tuned.model(**inputs).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
