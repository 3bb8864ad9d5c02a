"""A float32 base is set to W + s B A, always from the pristine W, as dense float64 has it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from adapters.adapter import Adapter, Delta, Dense, Factors
from adapters.algebra import stack
from adapters.refactoring import refactor
from models.tuned_model import TunedModel
from tests.dense_oracle import dense
from tools.rehearsal.tiny_models import open_model, random_adapter, random_examples

Weights = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def tuned(model_folder: Path) -> TunedModel:
    return open_model(model_folder)


def weights_of(tuned: TunedModel) -> dict[str, torch.Tensor]:
    """A copy of every parameter of the base, under its own name whether or not PEFT wraps it."""
    return {
        name.replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in tuned.model.state_dict().items()
        if "lora_" not in name
    }


def same_bytes(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def expected(tuned: TunedModel, adapter: Adapter, name: str, pristine: torch.Tensor) -> np.ndarray:
    """W + s B A in float64, laid out as the layer's weight: GPT-2's Conv1D holds W transposed."""
    delta = dense(adapter[name])
    is_conv1d = "transformer.h" in name
    return pristine.double().numpy() + (delta.T if is_conv1d else delta)


def test_merging_adds_the_dense_delta(tuned: TunedModel) -> None:
    before, adapter = weights_of(tuned), random_adapter(tuned, rank=5)
    tuned.merge(adapter)
    after = weights_of(tuned)
    for name in tuned.targets:
        dense_weight = expected(tuned, adapter, name, before[f"{name}.weight"])
        assert np.abs(dense(adapter[name])).max() > 0.1  # what is added is no rounding
        np.testing.assert_allclose(after[f"{name}.weight"].numpy(), dense_weight, atol=1e-6)


def test_merging_touches_the_target_weights_only(tuned: TunedModel) -> None:
    before = weights_of(tuned)
    tuned.merge(random_adapter(tuned, rank=2))
    after = weights_of(tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in tuned.targets}


def test_merging_nothing_restores_the_very_bytes(tuned: TunedModel) -> None:
    before = weights_of(tuned)
    tuned.merge(random_adapter(tuned, rank=3))
    tuned.merge(None)
    assert same_bytes(weights_of(tuned), before)


def test_merging_again_and_again_does_not_accumulate(tuned: TunedModel) -> None:
    first, second = random_adapter(tuned, 3, seed=1), random_adapter(tuned, 4, seed=2)
    tuned.merge(first)
    once = weights_of(tuned)
    for adapter in (first, second, first, None, second, first):
        tuned.merge(adapter)
    assert same_bytes(weights_of(tuned), once)
    tuned.merge(Adapter(dict(first)))  # an equal adapter, another object
    assert same_bytes(weights_of(tuned), once)


def test_merging_below_slots_is_the_same(tuned: TunedModel) -> None:
    adapter = random_adapter(tuned, 3)
    tuned.merge(adapter)
    bare = weights_of(tuned)
    for rank in (2, 6):
        with tuned.adapted(random_adapter(tuned, rank, seed=rank)):
            pass
    tuned.merge(None)
    tuned.merge(adapter)
    assert same_bytes(weights_of(tuned), bare)


def test_merging_within_a_slot_leaves_the_slot_as_it_is(tuned: TunedModel) -> None:
    adapter = random_adapter(tuned, 3)
    with tuned.adapted(adapter) as slot:
        assert slot is not None
        tuned.merge(random_adapter(tuned, 2, seed=9))
        read = slot.read()
    assert all(np.array_equal(read[name].b, adapter[name].b) for name in adapter)


def test_a_merged_adapter_gives_the_loss_of_the_same_adapter_in_a_slot(tuned: TunedModel) -> None:
    adapter, examples = random_adapter(tuned, 4), random_examples(tuned, 12)
    base = tuned.evaluate_global(None, None, examples).loss
    merged = tuned.evaluate_global(adapter, None, examples).loss
    beside = tuned.evaluate_global(None, adapter, examples).loss
    assert merged == pytest.approx(beside, rel=1e-5)
    assert abs(merged - base) > 1e-2


def test_a_dense_delta_merges_as_its_factors_do(tuned: TunedModel) -> None:
    adapter, examples = random_adapter(tuned, 4), random_examples(tuned, 12)
    whole = Delta({name: Dense(dense(f).astype(np.float32)) for name, f in adapter.items()})
    expected_loss = tuned.evaluate_global(adapter, None, examples).loss
    found = tuned.evaluate_global(whole, None, examples).loss
    assert found == pytest.approx(expected_loss, rel=1e-6)


def test_the_global_model_is_base_and_merged_and_start(tuned: TunedModel) -> None:
    merged, start = random_adapter(tuned, 4, seed=1), random_adapter(tuned, 2, seed=2)
    examples = random_examples(tuned, 12)
    both = tuned.evaluate_global(stack([merged, start], [1.0, 1.0]), None, examples).loss
    assert tuned.evaluate_global(merged, start, examples).loss == pytest.approx(both, rel=1e-5)
    one = tuned.evaluate_global(merged, None, examples).loss
    assert abs(both - one) > 1e-3
    assert tuned.evaluate_global(None, None, examples).loss not in (both, one)


def test_modules_of_different_ranks_merge_and_run_alike(tuned: TunedModel) -> None:
    whole = random_adapter(tuned, 6)
    mixed = Adapter(
        {
            name: Factors(f.a[:rank], f.b[:, :rank], f.scale)
            for rank, (name, f) in zip([0, 1, 3, 6] * 9, whole.items(), strict=False)
        }
    )
    examples = random_examples(tuned, 12)
    merged = tuned.evaluate_global(mixed, None, examples).loss
    assert tuned.evaluate_global(None, mixed, examples).loss == pytest.approx(merged, rel=1e-5)


def test_an_adapter_of_rank_zero_is_the_base(tuned: TunedModel) -> None:
    drawn = random_adapter(tuned, 2)
    nothing = refactor(stack([drawn], [0.0])).adapter
    assert nothing.rank == 0
    examples = random_examples(tuned, 8)
    base = tuned.evaluate_global(None, None, examples)
    assert tuned.evaluate_global(nothing, None, examples) == base
    assert tuned.evaluate_global(None, nothing, examples) == base


def test_shapes_are_rows_and_columns_of_w(llama_folder: Path, gpt2_folder: Path) -> None:
    llama, gpt2 = open_model(llama_folder), open_model(gpt2_folder)
    assert llama.shapes["model.layers.0.mlp.up_proj"] == (40, 24)  # from 24 to 40 features
    assert llama.shapes["model.layers.1.self_attn.k_proj"] == (12, 24)
    assert gpt2.shapes["transformer.h.0.attn.c_attn"] == (72, 24)
    assert gpt2.shapes["transformer.h.1.mlp.c_proj"] == (24, 96)


def test_the_pristine_weight_is_w_whatever_is_merged(tuned: TunedModel) -> None:
    before = {name: tuned.pristine_weight(name).clone() for name in tuned.targets}
    for name, weight in before.items():
        stored = tuned.model.get_submodule(name).weight
        conv1d = type(tuned.model.get_submodule(name)).__name__ == "Conv1D"
        assert torch.equal(weight, stored.T if conv1d else stored)
        assert tuple(weight.shape) == tuned.shapes[name]
    tuned.merge(random_adapter(tuned, 2))
    with tuned.adapted(random_adapter(tuned, 3)):
        for name, weight in before.items():
            assert torch.equal(tuned.pristine_weight(name), weight)
