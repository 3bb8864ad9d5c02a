"""A classifier computes what transformers computes, and only its head and factors ever change."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from adapters.adapter import FloatArray
from core.errors import AdapterError, UsageError
from models.tuned_model import TunedModel, resident_model
from tasks.encoding import Encoded
from tasks.examples import Example, Examples
from tasks.metrics import accuracy, macro_f1
from tools.rehearsal.tiny_models import (
    CONTEXT,
    open_model,
    random_adapter,
    random_head,
    random_texts,
    settings_for,
)

LABELS = ("neg", "pos", "so-so")
KINDS = ["bert", "llama", "gpt2"]
NAMES = {
    "bert": ["classifier.bias", "classifier.weight"],
    "llama": ["score.weight"],
    "gpt2": ["score.weight"],
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of base in turn; none of them holds a classifier."""
    found: Path = request.getfixturevalue(f"{request.param}_folder")
    return found


@pytest.fixture
def tuned(folder: Path) -> TunedModel:
    return open_model(folder, labels=LABELS)


def plain(folder: Path, head: Mapping[str, FloatArray]) -> Any:
    """transformers' own classifier with these values in its head."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), dtype=torch.float32
    )
    values = {name: torch.from_numpy(array.copy()) for name, array in head.items()}
    assert not model.load_state_dict(values, strict=False).unexpected_keys
    return model.eval()


def one_at_a_time(model: Any, texts: list[Encoded]) -> torch.Tensor:
    """Logits of each text alone, without padding, (texts, labels)."""
    with torch.no_grad():
        rows = [model(input_ids=torch.from_numpy(text.ids)[None]).logits[0] for text in texts]
    return torch.stack(rows)


def test_the_loss_is_that_of_transformers_and_padding_changes_none(
    tuned: TunedModel, folder: Path
) -> None:
    texts, head = random_texts(tuned, 9), random_head(tuned)
    oracle = plain(folder, head)
    alone = one_at_a_time(oracle, texts)
    wanted = torch.nn.functional.cross_entropy(
        alone, torch.tensor([text.label for text in texts]), reduction="sum"
    )
    batch = tuned.batch(texts)
    assert batch.targets == 9
    with torch.no_grad(), tuned.adapted(None, head=head):
        output = tuned.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
        found = tuned.loss_sum(batch)
    torch.testing.assert_close(output.logits, alone, rtol=1e-4, atol=1e-5)
    assert float(found) == pytest.approx(float(output.loss) * 9, rel=1e-5)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert found.dtype == torch.float32


def test_wider_padding_changes_no_logits(tuned: TunedModel) -> None:
    short, long = random_texts(tuned, 2, lengths=(5, 60))
    with torch.no_grad(), tuned.adapted(random_adapter(tuned, 2), head=random_head(tuned)):
        apart = [float(tuned.loss_sum(tuned.batch([text]))) for text in (short, long)]
        both = tuned.batch([short, long])
        assert both.input_ids.shape == (2, 64)
        assert float(tuned.loss_sum(both)) == pytest.approx(sum(apart), rel=1e-5)


def test_evaluation_is_that_of_one_text_at_a_time(tuned: TunedModel, folder: Path) -> None:
    texts, head = random_texts(tuned, 70), random_head(tuned)
    logits = one_at_a_time(plain(folder, head), texts).double()
    labels = [text.label for text in texts]
    losses = -logits.log_softmax(1)[torch.arange(70), labels]
    found = tuned.evaluate_global(None, None, texts, head)
    assert (found.loss, found.tokens) == (pytest.approx(float(losses.mean()), rel=1e-5), 70)
    guesses = logits.argmax(1).tolist()
    wanted = {"accuracy": accuracy(labels, guesses), "macro_f1": macro_f1(labels, guesses)}
    assert found.metrics == wanted
    assert 0 < wanted["accuracy"] < 1
    other = tuned.evaluate_global(None, random_adapter(tuned, 3), texts, head)
    assert other.loss != pytest.approx(found.loss, rel=1e-3)


def test_the_head_is_beside_the_targets(folder: Path, tuned: TunedModel) -> None:
    name = folder.name
    assert list(tuned.head_shapes) == NAMES[name]
    width = tuned.model.config.hidden_size
    assert tuned.head_shapes[NAMES[name][-1]] == (3, width)
    assert tuned.labels == LABELS
    modules = {parameter.rpartition(".")[0] for parameter in NAMES[name]}
    assert not modules & set(tuned.targets)
    assert tuned.targets
    with pytest.raises(UsageError, match=r"lora.target-modules: '\w+' matches no linear layer"):
        open_model(folder, targets=modules.pop(), labels=LABELS)


def test_a_causal_model_has_no_head(llama_folder: Path) -> None:
    tuned = open_model(llama_folder)
    assert (tuned.head_shapes, tuned.initial_head(3), tuned.labels) == ({}, {}, ())
    with tuned.adapted(random_adapter(tuned, 2), head={}) as slot:
        assert slot is not None
        assert slot.read_head() == {}
        assert len(slot.parameters("both")) == 2 * len(tuned.targets)
    with pytest.raises(AdapterError, match="the head differs from the base model's in"):
        tuned.evaluate_global(None, None, [], {"score.weight": np.zeros((2, 2), np.float32)})


def test_a_new_head_is_drawn_by_the_seed(tuned: TunedModel, folder: Path) -> None:
    again = open_model(folder, labels=LABELS)
    first, same, other = tuned.initial_head(5), again.initial_head(5), tuned.initial_head(6)
    weight = NAMES[folder.name][-1]
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first[weight], other[weight])
    with tuned.adapted(random_adapter(tuned, 2)) as slot:
        assert slot is not None
        assert np.array_equal(slot.read_head()[weight], tuned.initial_head(0)[weight])


def test_a_head_that_was_written_is_read_and_leaves_no_trace(tuned: TunedModel) -> None:
    texts, head = random_texts(tuned, 5), random_head(tuned)
    before = tuned.evaluate(texts)
    for value in head.values():
        value.setflags(write=False)  # as unpacked from bytes
    with tuned.adapted(random_adapter(tuned, 2), head=head) as slot:
        assert slot is not None
        read = slot.read_head()
        assert tuned.evaluate(texts).loss != before.loss
    assert list(read) == list(tuned.head_shapes)
    assert all(np.array_equal(read[name], head[name]) for name in head)
    assert tuned.evaluate(texts) == before == tuned.evaluate_global(None, None, texts)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 24), (3, 24, 1)])
def test_a_head_of_another_shape_is_refused(shape: tuple[int, ...], llama_folder: Path) -> None:
    tuned = open_model(llama_folder, labels=LABELS)
    with pytest.raises(AdapterError, match=r"the head differs from .* in .*score.weight"):
        tuned.evaluate_global(None, None, [], {"score.weight": np.zeros(shape, np.float32)})


@pytest.mark.parametrize("trains", ["A", "B", "both"])
def test_training_moves_the_head_and_the_chosen_factors_only(
    trains: str, tuned: TunedModel
) -> None:
    texts, adapter, head = random_texts(tuned, 8), random_adapter(tuned, 3), random_head(tuned)
    base = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    with tuned.adapted(adapter, head=head) as slot:
        assert slot is not None
        parameters = slot.parameters(trains)
        factors = len(tuned.targets) * (2 if trains == "both" else 1)
        assert len(parameters) == factors + len(head)
        shapes = [tuple(parameter.shape) for parameter in parameters[factors:]]
        assert shapes == list(tuned.head_shapes.values())
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0, fused=True)
        losses = []
        for _ in range(12):
            loss = tuned.loss_sum(tuned.batch(texts)) / len(texts)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        trained, trained_head = slot.read(), slot.read_head()
        assert any(p.requires_grad for p in tuned.model.parameters())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not np.array_equal(trained_head[name], head[name]) for name in head)
    for half, letter in (("a", "A"), ("b", "B")):
        moved = [
            not np.array_equal(getattr(trained[n], half), getattr(adapter[n], half))
            for n in adapter
        ]
        assert all(moved) if letter in trains or trains == "both" else not any(moved)
    assert all(p.grad is None and not p.requires_grad for p in tuned.model.parameters())
    now = {name.replace(".base_layer", ""): p for name, p in tuned.model.named_parameters()}
    assert all(torch.equal(now[name], value) for name, value in base.items())
    found = tuned.evaluate_global(None, trained, texts, trained_head)
    assert found.loss < losses[-1] + 0.05


def test_its_gradient_is_that_of_the_models_own_loss(tuned: TunedModel) -> None:
    batch = tuned.batch(random_texts(tuned, 6))
    with tuned.adapted(random_adapter(tuned, 3), head=random_head(tuned)) as slot:
        assert slot is not None
        parameters = slot.parameters("both")
        ours = torch.autograd.grad(tuned.loss_sum(batch) / batch.targets, parameters)
        own = tuned.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
        theirs = torch.autograd.grad(own.loss, parameters)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in theirs) > 1e-3


def test_in_half_precision_the_head_stays_in_single(folder: Path) -> None:
    exact = open_model(folder, labels=LABELS)
    half = open_model(folder, dtype="bfloat16", labels=LABELS)
    texts, head = random_texts(exact, 6), random_head(exact)
    wanted = exact.evaluate_global(None, None, texts, head).loss
    with half.adapted(random_adapter(half, 2, size=0.01), head=head) as slot:
        assert slot is not None
        read = slot.read_head()
        assert all(np.array_equal(read[name], head[name]) for name in head)
        slot.parameters("both")
        loss = half.loss_sum(half.batch(texts))
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.item() / 6 == pytest.approx(wanted, rel=0.1)
    assert half.evaluate_global(None, None, texts, head).loss == pytest.approx(wanted, rel=0.1)


def test_under_autocast_the_loss_is_summed_in_float32(tuned: TunedModel) -> None:
    texts = random_texts(tuned, 6)
    with tuned.adapted(random_adapter(tuned, 2), head=random_head(tuned)) as slot:
        assert slot is not None
        exact = tuned.loss_sum(tuned.batch(texts))
        parameters = slot.parameters("both")
        with torch.autocast("cpu", torch.bfloat16):
            found = tuned.loss_sum(tuned.batch(texts))
        found.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in parameters)
    assert found.dtype == torch.float32
    assert found.item() != exact.item()
    assert found.item() == pytest.approx(exact.item(), rel=0.1)


def test_texts_are_encoded_for_the_models_labels(tuned: TunedModel, folder: Path) -> None:
    data = settings_for(folder, data__path="mine.jsonl").data
    examples = Examples(
        [Example("a text", "so-so", ""), Example(" ", "neg", ""), Example("b", "neg", "")]
    )
    encoding = tuned.encode(examples, data)
    assert [text.label for text in encoding.examples] == [2, 0]
    assert tuned.encode(examples, data) is encoding
    with pytest.raises(UsageError, match="none of 1 examples has a text to classify"):
        tuned.encode(examples[1:2], data)
    batch = tuned.batch(encoding.examples)
    assert batch.labels.tolist() == [2, 0]


def test_the_resident_model_is_one_for_each_set_of_labels(bert_folder: Path) -> None:
    settings = settings_for(bert_folder)
    first = resident_model(settings.model, settings.lora, labels=["a", "b"])
    assert resident_model(settings.model, settings.lora, None, ("a", "b")) is first
    other = resident_model(settings.model, settings.lora, labels=("b", "a"))
    assert other is not first
    assert other.labels == ("b", "a")


def test_the_models_positions_count_and_a_tokenizers_limit_and_side_of_cutting_do_not(
    bert_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "short"))
    file = folder / "tokenizer_config.json"
    entries = {"model_max_length": 50, "truncation_side": "left"}
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    tuned = open_model(folder, labels=LABELS)
    assert tuned.base.context == CONTEXT == 64
    example = Example("first " + "and more " * 40, "pos", "")
    for context in (10, 64):
        data = settings_for(folder, data__path="mine.jsonl", data__context=context).data
        (text,) = tuned.encode([example], data).examples
        assert len(text.ids) == context
    assert tuned.base.tokenizer.decode(text.ids.tolist()).startswith("<s>first and")


@pytest.mark.embedded
def test_the_embedded_model_can_learn_to_classify() -> None:
    tuned = open_model(Path("embedded"), "q_proj,v_proj", labels=LABELS)
    (name,) = tuned.head_shapes
    texts = random_texts(tuned, 4)
    found = tuned.evaluate(texts)
    assert (name, found.tokens) == ("score.weight", 4)
    assert found.loss == pytest.approx(math.log(3), abs=1.0)
    zeros = {name: np.zeros(tuned.head_shapes[name], np.float32)}
    blind = tuned.evaluate_global(None, None, texts, zeros)
    assert blind.loss == pytest.approx(math.log(3), rel=1e-6)
