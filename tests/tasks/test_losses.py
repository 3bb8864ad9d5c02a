"""The loss is transformers' own, whatever the batch, and one model serves the whole process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from core.errors import UsageError
from models import tuned_model
from models.tuned_model import HeldOutLoss, TunedModel, resident_model
from settings.run import RunSettings
from settings.site import Site
from tasks.encoding import Batch, Encoded
from tasks.examples import Example, Examples
from tools.rehearsal.tiny_models import (
    model_settings,
    open_model,
    random_adapter,
    random_examples,
    settings_for,
)

EXAMPLES = Examples(Example(f"add {i} and {i}", "sum " * (i % 7 + 1), "") for i in range(20))


@pytest.fixture
def tuned(model_folder: Path) -> TunedModel:
    return open_model(model_folder)


def own_loss(tuned: TunedModel, batch: Batch) -> torch.Tensor:
    """The mean loss that the model itself computes from labels."""
    output = tuned.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    )
    loss: torch.Tensor = output.loss
    return loss


def one_at_a_time(tuned: TunedModel, examples: list[Encoded]) -> HeldOutLoss:
    """The mean loss per target token from one forward for each example, without padding."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.from_numpy(example.ids)[None]
            logits = tuned.model(input_ids=ids).logits[0].double()
            for position in range(example.loss_from, len(example.ids)):
                total -= float(logits[position - 1].log_softmax(-1)[example.ids[position]])
                tokens += 1
    return HeldOutLoss(total / tokens, tokens)


@pytest.mark.parametrize(("earliest", "first"), [(1, 1), (31, 1), (40, 32)])
def test_the_summed_loss_is_the_models_own_mean_times_the_targets(
    earliest: int, first: int, tuned: TunedModel
) -> None:
    examples = [
        Encoded(e.ids, max(earliest, min(e.loss_from, len(e.ids) - 1)))
        for e in random_examples(tuned, 6, lengths=(45, 50, 61))
    ]
    batch = tuned.batch(examples)
    assert batch.first_target == first
    with torch.no_grad():
        expected = float(own_loss(tuned, batch)) * batch.targets
        assert float(tuned.loss_sum(batch)) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_that_of_the_models_own_loss(tuned: TunedModel) -> None:
    batch = tuned.batch(random_examples(tuned, 6))
    with tuned.adapted(random_adapter(tuned, 3)) as slot:
        assert slot is not None
        parameters = slot.parameters("both")
        ours = torch.autograd.grad(tuned.loss_sum(batch) / batch.targets, parameters)
        theirs = torch.autograd.grad(own_loss(tuned, batch), parameters)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.abs().max() > 1e-4


def test_a_blind_guess_costs_the_logarithm_of_the_vocabulary(
    llama_folder: Path,
) -> None:
    tuned = open_model(llama_folder)
    vocabulary = len(tuned.base.tokenizer)
    examples = random_examples(tuned, 4)
    with torch.no_grad():
        tuned.model.lm_head.weight.zero_()
        loss = tuned.evaluate(examples).loss
    assert loss == pytest.approx(float(torch.tensor(vocabulary).log()), rel=1e-5)


def test_evaluation_is_that_of_one_example_at_a_time(tuned: TunedModel) -> None:
    examples = random_examples(tuned, 70, lengths=(3, 30, 7, 12, 21))  # three batches, padded
    with tuned.adapted(random_adapter(tuned, 3)):
        naive, found = one_at_a_time(tuned, examples), tuned.evaluate(examples)
    assert found.loss == pytest.approx(naive.loss, rel=1e-5)
    assert found.tokens == naive.tokens == sum(len(e.ids) - e.loss_from for e in examples)


def test_evaluation_does_not_depend_on_the_order_of_the_examples(tuned: TunedModel) -> None:
    examples = random_examples(tuned, 40)
    found, reversed_ = tuned.evaluate(examples), tuned.evaluate(examples[::-1])
    assert found.loss == pytest.approx(reversed_.loss, rel=1e-6)


def test_padding_changes_no_examples_loss(tuned: TunedModel) -> None:
    short, long = random_examples(tuned, 2, lengths=(5, 40))
    with torch.no_grad():
        apart = [float(tuned.loss_sum(tuned.batch([example]))) for example in (short, long)]
        together = float(tuned.loss_sum(tuned.batch([short, long])))
    assert together == pytest.approx(sum(apart), rel=1e-5)


def test_half_precision_logits_are_summed_in_float32(llama_folder: Path) -> None:
    tuned = open_model(llama_folder, dtype="bfloat16")
    batch = tuned.batch(random_examples(tuned, 4))
    with torch.no_grad():
        logits = tuned.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        wanted = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="sum"
        )
        found = tuned.loss_sum(batch)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=1e-2)


def test_encoding_is_kept_for_the_next_round(tuned: TunedModel, model_folder: Path) -> None:
    data = settings_for(model_folder, data__path="mine.jsonl").data
    first = tuned.encode(EXAMPLES, data)
    assert tuned.encode(EXAMPLES, data) is first
    assert len(first.examples) == 20
    shorter = settings_for(model_folder, data__path="mine.jsonl", data__context=20).data
    assert max(len(e.ids) for e in tuned.encode(EXAMPLES, shorter).examples) == 20
    assert len(tuned.encode(EXAMPLES[:4], data).examples) == 4


def test_a_context_beyond_the_models_is_refused(tuned: TunedModel, model_folder: Path) -> None:
    data = settings_for(model_folder, data__path="mine.jsonl", data__context=65).data
    with pytest.raises(
        UsageError, match=r"data.context is 65 tokens, but .* takes at most 64: set data.context=64"
    ):
        tuned.encode(EXAMPLES, data)


def test_examples_of_which_none_fits_are_refused(tuned: TunedModel, model_folder: Path) -> None:
    data = settings_for(
        model_folder, data__path="m.jsonl", data__context=8, data__template="a long one: {prompt}"
    ).data
    with pytest.raises(
        UsageError, match=r"none of 20 examples leaves room for a response within data.context=8"
    ):
        tuned.encode(EXAMPLES, data)


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """As in a process that has loaded no model yet."""
    tuned_model._resident.cache_clear()
    yield
    tuned_model._resident.cache_clear()


@pytest.mark.usefixtures("fresh_process")
def test_one_model_is_resident_for_all_clients(llama_folder: Path) -> None:
    settings: RunSettings = settings_for(llama_folder)
    first = resident_model(settings.model, settings.lora)
    sites = [Site("client-00", 0), Site("client-01", 1, rank=3, data_path="elsewhere.jsonl")]
    again = [resident_model(settings.model, settings.lora, site) for site in sites]
    same = settings_for(llama_folder, lora__rank="4", lora__dropout=0.1, lora__alpha="3")
    assert all(model is first for model in again)
    assert resident_model(same.model, same.lora) is first


@pytest.mark.usefixtures("fresh_process")
def test_what_the_site_owns_wins(llama_folder: Path, gpt2_folder: Path) -> None:
    settings = settings_for(llama_folder)
    site = Site("oslo", 0, model_path=str(gpt2_folder), device="cpu")
    run = model_settings(llama_folder, device="no such device")
    tuned = resident_model(run, settings.lora, site)
    assert tuned.base.path == str(gpt2_folder)
    assert tuned.device == torch.device("cpu")


@pytest.mark.usefixtures("fresh_process")
def test_another_model_or_other_targets_take_the_place(
    llama_folder: Path, gpt2_folder: Path
) -> None:
    first = settings_for(llama_folder)
    other = settings_for(llama_folder, lora__target_modules="q_proj")
    third = settings_for(gpt2_folder)
    models = [resident_model(s.model, s.lora) for s in (first, other, third)]
    assert len(set(map(id, models))) == 3
    assert list(models[1].shapes) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert tuned_model._resident.cache_info().currsize == 1
