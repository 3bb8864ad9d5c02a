"""An adapter in a slot computes what PEFT computes, and leaves no trace when it is taken out."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from adapters.adapter import Adapter
from core.errors import UsageError
from models.tuned_model import TunedModel
from tools.rehearsal.tiny_models import open_model, random_adapter, random_examples


@pytest.fixture
def tuned(model_folder: Path) -> TunedModel:
    return open_model(model_folder)


@pytest.fixture
def tokens(tuned: TunedModel) -> torch.Tensor:
    """Some input, (2, 20)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, len(tuned.base.tokenizer), (2, 20), generator=generator)


def logits(tuned: TunedModel, tokens: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    with torch.no_grad(), tuned.adapted(adapter):
        found: torch.Tensor = tuned.model(input_ids=tokens).logits
        return found


def peft_model(folder: Path, targets: list[str], adapter: Adapter) -> peft.PeftModel:
    """PEFT's own model with these factors, of one rank and one scale."""
    (scale,) = {factors.scale for factors in adapter.values()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank * scale,
        target_modules=targets,
        fan_in_fan_out="gpt2" in folder.name,
    )
    wrapped = peft.get_peft_model(model, config)
    state = {}
    for name, factors in adapter.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(factors.a)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(factors.b)
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys
    return wrapped.eval()


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_an_adapted_forward_is_that_of_pefts_own_model(
    rank: int, tuned: TunedModel, tokens: torch.Tensor, model_folder: Path
) -> None:
    adapter = random_adapter(tuned, rank)
    oracle = peft_model(model_folder, tuned.targets, adapter)
    with torch.no_grad():
        wanted = oracle(input_ids=tokens).logits
        with oracle.disable_adapter():
            bare = oracle(input_ids=tokens).logits
    torch.testing.assert_close(logits(tuned, tokens, adapter), wanted, rtol=0, atol=1e-5)
    assert (wanted - bare).abs().max() > 0.1


def test_without_an_adapter_it_is_the_base_alone(
    tuned: TunedModel, tokens: torch.Tensor, model_folder: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = base(input_ids=tokens).logits
    assert torch.equal(logits(tuned, tokens, None), wanted)
    logits(tuned, tokens, random_adapter(tuned, 3))
    assert torch.equal(logits(tuned, tokens, None), wanted)
    with torch.no_grad():  # nor does an adapter stay behind when its context is left
        assert torch.equal(tuned.model(input_ids=tokens).logits, wanted)


def test_adapters_of_other_ranks_in_between_leave_no_trace(
    tuned: TunedModel, tokens: torch.Tensor
) -> None:
    adapter = random_adapter(tuned, 4, seed=1)
    before = logits(tuned, tokens, adapter)
    for rank, seed in ((2, 2), (4, 3), (9, 4), (4, 5)):
        assert not torch.equal(logits(tuned, tokens, random_adapter(tuned, rank, seed)), before)
    assert torch.equal(logits(tuned, tokens, adapter), before)


def test_a_slot_gives_back_what_was_written(tuned: TunedModel) -> None:
    adapter = random_adapter(tuned, 4)
    with tuned.adapted(adapter) as slot:
        assert slot is not None
        read = slot.read()
    assert read.shapes == adapter.shapes
    for name, factors in adapter.items():
        assert np.array_equal(read[name].a, factors.a)
        assert np.array_equal(read[name].b, factors.b)
        assert read[name].scale == factors.scale


def test_what_was_read_is_a_copy(tuned: TunedModel) -> None:
    adapter = random_adapter(tuned, 4)
    with tuned.adapted(adapter) as slot:
        assert slot is not None
        read = slot.read()
    with tuned.adapted(random_adapter(tuned, 4, seed=1)):
        pass
    assert all(np.array_equal(read[name].b, adapter[name].b) for name in adapter)


def lora_values(tuned: TunedModel) -> int:
    return sum(p.numel() for name, p in tuned.model.named_parameters() if "lora_" in name)


def test_one_slot_takes_every_rank_and_is_empty_in_between(tuned: TunedModel) -> None:
    for rank in (*range(12, 0, -1), 4):  # as a client that prunes itself passes through
        adapter = random_adapter(tuned, rank)
        with tuned.adapted(adapter, dropout=rank / 100):
            assert lora_values(tuned) == adapter.num_parameters
        assert lora_values(tuned) == 0
    for name in tuned.targets:
        assert len(tuned.model.get_submodule(name).lora_A) == 1


@pytest.mark.parametrize(("trains", "expected"), [("A", {"A"}), ("B", {"B"}), ("both", {"A", "B"})])
def test_only_the_chosen_factors_of_the_slot_train(
    trains: str, expected: set[str], tuned: TunedModel
) -> None:
    with tuned.adapted(random_adapter(tuned, 2)):
        pass
    with tuned.adapted(random_adapter(tuned, 3)) as slot:
        assert slot is not None
        chosen = slot.parameters(trains)
        training = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
        assert len(chosen) == len(training) == len(expected) * len(tuned.targets)
        assert {name.split("lora_")[1][0] for name in training} == expected
        assert {name.rpartition("lora_")[2].split(".")[1] for name in training} == {slot.name}
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_a_context_left_by_an_error_leaves_the_base(
    tuned: TunedModel, tokens: torch.Tensor
) -> None:
    base = logits(tuned, tokens, None)

    def fail() -> None:
        with tuned.adapted(random_adapter(tuned, 3)) as slot:
            assert slot is not None
            slot.parameters("both")
            tuned.model(input_ids=tokens).logits.sum().backward()
            assert any(p.grad is not None for p in tuned.model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with torch.no_grad():
        assert torch.equal(tuned.model(input_ids=tokens).logits, base)
    assert all(p.grad is None and not p.requires_grad for p in tuned.model.parameters())


def test_dropout_is_in_training_only(llama_folder: Path) -> None:
    tuned = open_model(llama_folder)
    adapter, examples = random_adapter(tuned, 4), random_examples(tuned, 4)
    batch = tuned.batch(examples)
    plain = tuned.evaluate_global(None, adapter, examples)
    with torch.no_grad(), tuned.adapted(adapter, dropout=0.5):
        assert tuned.evaluate(examples) == plain
        tuned.model.train()
        torch.manual_seed(0)
        losses = [float(tuned.loss_sum(batch)) / batch.targets for _ in range(2)]
        assert tuned.evaluate(examples) == plain
    assert len({plain.loss, *losses}) == 3


@pytest.mark.parametrize(("rank", "fits"), [(1, True), (12, True), (13, False)])
def test_a_rank_beyond_the_smallest_matrix_is_refused(
    rank: int, fits: bool, llama_folder: Path
) -> None:
    tuned = open_model(llama_folder)
    if fits:
        tuned.check_rank(rank)
        return
    expected = (
        r"rank 13 is more than module model.layers.0.self_attn.k_proj of shape 12 x 24 can have: "
        "take at most 12, or leave that module out of lora.target-modules"
    )
    with pytest.raises(UsageError, match=expected):
        tuned.check_rank(rank)
    open_model(llama_folder, "q_proj,up_proj").check_rank(rank)
