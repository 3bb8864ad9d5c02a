"""On any base but float32 what is merged lies beside it, in float32; the base stays as it is."""

import gc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
import transformers

from adapters.adapter import Adapter, Dense, Factors
from adapters.algebra import stack
from models import merging
from models.principal import principal_factors
from models.tuned_model import TunedModel
from tests.dense_oracle import dense
from tools.rehearsal.tiny_models import open_format, open_model, random_adapter, random_examples

HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Format -> half a unit in the last place of 1."""
BESIDE = [*HALF, "int8", "nf4"]


def state_of(tuned: TunedModel) -> dict[str, torch.Tensor]:
    """A copy of all that the base holds, quantized storage and its scales included."""
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in tuned.model.state_dict().items()
        if "lora_" not in name
    }


def as_matrices(adapter: Adapter) -> Adapter:
    """The same deltas as dense matrices."""
    deltas = {name: Dense(dense(f).astype(np.float32)) for name, f in adapter.items()}
    return Adapter(deltas)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BESIDE)
def test_nothing_is_ever_written_into_the_base(name: str, llama_folder: Path) -> None:
    tuned = open_format(llama_folder, name)
    before, examples = state_of(tuned), random_examples(tuned, 8)
    base = tuned.evaluate_global(None, None, examples).loss
    for merged in (random_adapter(tuned, 3), as_matrices(random_adapter(tuned, 2)), None):
        found = tuned.evaluate_global(merged, random_adapter(tuned, 2, seed=5), examples).loss
        assert abs(found - base) > 1e-3
        after = state_of(tuned)
        assert all(torch.equal(after[key], value) for key, value in before.items())
    assert tuned.evaluate_global(None, None, examples).loss == base


def least_squares_delta(
    x: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> npt.NDArray[np.float64]:
    """The matrix that, between two layers, explains the difference of their outputs best."""
    found = np.linalg.lstsq(x.double().numpy(), (after.double() - before.double()).numpy())[0]
    return found.T


@pytest.mark.parametrize("dtype", list(HALF))
def test_a_small_delta_is_whole_beside_the_base_and_lost_within_it(
    dtype: str, llama_folder: Path
) -> None:
    tuned = open_model(llama_folder, dtype=dtype)
    name = "model.layers.0.mlp.up_proj"
    weight = tuned.pristine_weight(name).clone()
    drawn = random_adapter(tuned, 3)
    size = HALF[dtype] * float(weight.norm()) / float(np.linalg.norm(dense(drawn[name])))
    small = Adapter({key: Factors(f.a, f.b, f.scale * size) for key, f in drawn.items()})
    delta = dense(small[name])
    x = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    x = x.to(getattr(torch, dtype))
    with torch.no_grad():
        layer = tuned.model.get_submodule(name)
        bare = layer(x)
        tuned.merge(small)
        beside = tuned.model.get_submodule(name)(x)
        written = (weight + torch.from_numpy(delta).float()).to(x.dtype)
        within = torch.nn.functional.linear(x, written)
    assert beside.dtype == bare.dtype == x.dtype
    errors = [
        np.linalg.norm(least_squares_delta(x, bare, after) - delta) / np.linalg.norm(delta)
        for after in (beside, within)
    ]
    assert errors[0] < 0.1  # outputs are in 16 bits, whatever adds up to them
    assert errors[1] > 0.3


def plain_peft(folder: Path, dtype: str, adapter: Adapter) -> peft.PeftModel:
    """The base in this format under PEFT's own wrapper, which holds an adapter in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=list(adapter),
        fan_in_fan_out="gpt2" in folder.name,
    )
    wrapped = peft.get_peft_model(model, config)
    state = {}
    for name, f in adapter.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.from_numpy(f.a)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.from_numpy(f.b * f.scale)
    assert not peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
    return wrapped.eval()


@pytest.mark.parametrize("dtype", list(HALF))
def test_a_clients_model_is_the_base_with_pefts_adapter_of_the_total(
    dtype: str, model_folder: Path
) -> None:
    """What `aggregation_noise` is measured on: the sum of merged and start."""
    tuned = open_model(model_folder, dtype=dtype)
    merged, start = (random_adapter(tuned, rank, rank, 0.5) for rank in (5, 3))
    oracle = plain_peft(model_folder, dtype, stack([merged, start], [1.0, 1.0]))
    batch = tuned.batch(random_examples(tuned, 8))
    with torch.no_grad():
        wanted = oracle(input_ids=batch.input_ids).logits.float()
        with oracle.disable_adapter():
            bare = oracle(input_ids=batch.input_ids).logits.float()
        tuned.merge(merged)
        with tuned.adapted(start):
            found = tuned.model(input_ids=batch.input_ids).logits
    assert found.dtype == getattr(torch, dtype)
    assert (found.float() - wanted).norm() < 4 * HALF[dtype] * wanted.norm()
    assert (bare - wanted).norm() > 0.3 * wanted.norm()


@pytest.mark.parametrize("name", ["float32", *BESIDE])
def test_a_delta_as_a_matrix_is_the_same_delta(name: str, llama_folder: Path) -> None:
    tuned = open_format(llama_folder, name)
    merged, examples = random_adapter(tuned, 3), random_examples(tuned, 8)
    factors = tuned.evaluate_global(merged, None, examples).loss
    matrices = tuned.evaluate_global(as_matrices(merged), None, examples).loss
    tolerance = 1e-5 if name in ("float32", "int8", "nf4") else 1e-3
    assert matrices == pytest.approx(factors, rel=tolerance)
    assert abs(tuned.evaluate_global(None, None, examples).loss - factors) > 1e-2


def test_what_was_merged_is_freed_when_it_is_replaced(model_folder: Path) -> None:
    def branches() -> int:
        gc.collect()
        return sum(type(each) is merging._Branch for each in gc.get_objects())

    tuned = open_model(model_folder, dtype="bfloat16")
    before = branches()
    for rank in range(1, 6):
        tuned.merge(random_adapter(tuned, rank))
        assert branches() == before + len(tuned.targets)
    tuned.merge(None)
    assert branches() == before


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_weight_of_a_quantized_layer_is_transformers_own_dequantized_one(
    quantization: str, llama_folder: Path
) -> None:
    tuned = open_model(llama_folder, quantization=quantization)
    examples = random_examples(tuned, 4)
    tuned.evaluate_global(random_adapter(tuned, 2), random_adapter(tuned, 3), examples)
    wanted = open_model(llama_folder, quantization=quantization).model.dequantize().state_dict()
    exact = open_model(llama_folder)
    assert tuned.shapes == exact.shapes
    for name in tuned.targets:
        weight = tuned.pristine_weight(name)
        torch.testing.assert_close(weight, wanted[f"{name}.weight"], rtol=0, atol=1e-6)
        assert 1e-4 < (weight - exact.pristine_weight(name)).abs().max() < 0.3
    for name, factors in principal_factors(tuned, 4).items():
        _, values, _ = np.linalg.svd(wanted[f"{name}.weight"].double().numpy())
        rows = np.linalg.norm(factors.a.astype(np.float64), axis=1)
        assert np.allclose(rows, np.sqrt(values[:4]), rtol=1e-4)
