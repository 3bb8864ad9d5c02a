"""A classifier's base is common and checked; its head is loaded, or drawn where it lacks."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from core.errors import UsageError
from models.base_model import load_base_model
from settings.run import run_settings
from tasks.examples import Example
from tools.rehearsal.tiny_models import CONTEXT, open_model, save_bert, save_roberta, tiny_tokenizer

LABELS = ("neg", "pos", "so-so")


def edited(folder: Path, place: Path, values: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy whose checkpoint has these tensors, or lacks those that are None."""
    copy = Path(shutil.copytree(folder, place))
    weights = load_file(copy / "model.safetensors") | dict(values)
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture
def classifier_folder(tmp_path: Path) -> Path:
    """A BERT that already sorts into three classes."""
    return save_bert(tmp_path / "sorter", kind="BertForSequenceClassification", num_labels=3)


def identity(folder: Path, labels: tuple[str, ...] = LABELS) -> str:
    return load_base_model(str(folder), "float32", "cpu", labels).identity


def test_the_identity_is_that_of_base_and_labels_without_the_head(
    classifier_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(classifier_folder / "model.safetensors")
    other_head = {"classifier.weight": weights["classifier.weight"] + 1.0}
    without: dict[str, None] = {"classifier.weight": None, "classifier.bias": None}
    query = "bert.encoder.layer.1.attention.self.query.weight"
    same = identity(classifier_folder)
    assert identity(edited(classifier_folder, tmp_path / "head", other_head)) == same
    assert identity(edited(classifier_folder, tmp_path / "none", without)) == same
    changed = edited(classifier_folder, tmp_path / "base", {query: weights[query] + 0.01})
    assert identity(changed) != same
    assert identity(classifier_folder, ("pos", "neg", "so-so")) != same


def test_a_head_in_the_checkpoint_is_where_training_begins(
    classifier_folder: Path, tmp_path: Path
) -> None:
    on_disk = load_file(classifier_folder / "model.safetensors")
    tuned = open_model(classifier_folder, labels=LABELS)
    for seed in (0, 9):
        initial = tuned.initial_head(seed)
        assert all(np.array_equal(initial[name], on_disk[name].numpy()) for name in initial)
    assert "classifier" not in tuned.targets
    half = edited(classifier_folder, tmp_path / "half", {"classifier.weight": None})
    initial = open_model(half, labels=LABELS).initial_head(9)
    assert np.array_equal(initial["classifier.bias"], on_disk["classifier.bias"].numpy())
    assert np.abs(initial["classifier.weight"]).max() < 0.1 < on_disk["classifier.weight"].max()


def test_a_head_of_other_labels_is_drawn_anew(classifier_folder: Path) -> None:
    tuned = open_model(classifier_folder, labels=["no", "yes"])
    assert tuned.head_shapes == {"classifier.bias": (2,), "classifier.weight": (2, 16)}
    first, other = tuned.initial_head(0), tuned.initial_head(1)
    assert not np.array_equal(first["classifier.weight"], other["classifier.weight"])


def test_a_pooler_that_is_lacking_belongs_to_the_head(tmp_path: Path) -> None:
    tuned = open_model(save_bert(tmp_path / "masked", kind="BertForMaskedLM"), labels=LABELS)
    pooler = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert list(tuned.head_shapes) == [*pooler, "classifier.bias", "classifier.weight"]
    assert "bert.pooler.dense" not in tuned.targets
    with_one = open_model(save_bert(tmp_path / "whole"), labels=LABELS)
    assert "bert.pooler.dense" in with_one.targets
    assert tuned.base.identity != with_one.base.identity


def test_other_weights_that_are_lacking_are_named(bert_folder: Path, tmp_path: Path) -> None:
    key = "encoder.layer.1.output.dense.weight"
    folder = edited(bert_folder, tmp_path / "part", {key: None})
    with pytest.raises(UsageError, match=f"is not whole: its weights lack bert.{key}$"):
        open_model(folder, labels=LABELS)


def test_a_shape_that_is_not_the_configs_is_named(bert_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "wide"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(UsageError, match=r"config.json and weights differ in the shape of bert.e"):
        open_model(folder, labels=LABELS)


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "vision"
    transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    ).save_pretrained(place)
    with pytest.raises(UsageError, match=r"no sequence classifier can .* \(model_type vit\): tra"):
        open_model(place, labels=LABELS)
    with pytest.raises(UsageError, match="holds no model: expected config"):
        open_model(tmp_path, labels=LABELS)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(adds="both")
    tokenizer.save_pretrained(tmp_path)
    transformers.T5ForSequenceClassification(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"made of .* \(model_type t5\): Bouquet tunes no encoder-de"
    ):
        open_model(tmp_path, labels=LABELS)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_positions_behind_the_padding_index_are_those_that_can_be_used(
    length: int, tmp_path: Path
) -> None:
    """RoBERTa's table has two rows more, and its tokenizer believes in them."""
    tuned = open_model(save_roberta(tmp_path), labels=LABELS)
    assert tuned.base.context == CONTEXT
    text = [Example(prompt="a b " * 50, response="neg", group="")]
    settings = run_settings({"data.context": length, "data.path": "texts.jsonl"})
    if length > CONTEXT:
        with pytest.raises(
            UsageError, match=f"takes at most {CONTEXT}: set data.context={CONTEXT}"
        ):
            tuned.encode(text, settings.data)
        return
    encoded = tuned.encode(text, settings.data).examples
    assert len(encoded[0].ids) == CONTEXT
    assert tuned.evaluate(encoded).tokens == 1
