"""Experts as linear layers: what they compute is what PEFT's own layers for parameters compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters.adapter import Adapter, Factors
from adapters.algebra import stack
from adapters.peft_files import write_peft
from client.training import train
from core.errors import UsageError
from models.tuned_model import TunedModel
from tests.dense_oracle import dense
from tools.rehearsal.tiny_models import (
    open_model,
    random_adapter,
    random_examples,
    save_gpt_oss,
    save_llama,
    save_mixtral,
    settings_for,
)

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SAVERS: dict[str, Callable[[Path], Path]] = {"mixtral": save_mixtral, "gpt-oss": save_gpt_oss}


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of shape (E, m, n), and of shape (E, n, m)."""
    return SAVERS[request.param](tmp_path_factory.mktemp("mixture") / request.param)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (3, 24))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def expert_names(layers: int = 2, experts: int = 3) -> set[str]:
    return {
        f"model.layers.{layer}.mlp.experts.matrices.{place}.{name}.{expert}"
        for layer in range(layers)
        for place, name in ((0, "gate_up_proj"), (1, "down_proj"))
        for expert in range(experts)
    }


def mixed(tuned: TunedModel, seed: int = 0) -> Adapter:
    """Factors whose ranks and scales differ from module to module; one is zero."""
    modules = {}
    for number, (name, (m, n)) in enumerate(tuned.shapes.items()):
        rng, rank = np.random.default_rng([seed, number]), number % 4
        a = rng.standard_normal((rank, n), dtype=np.float32)
        b = rng.standard_normal((m, rank), dtype=np.float32)
        modules[name] = Factors(a, b, 0.02 * (1 + number % 3))
    return Adapter(modules)


def test_without_an_adapter_the_experts_are_what_they_were(mixture: Path) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(mixture).eval())
    tuned = open_model(mixture, "q_proj", parameters=EXPERTS)
    assert torch.equal(logits(tuned.model), plain)
    with tuned.adapted(random_adapter(tuned, 2)):
        assert not torch.allclose(logits(tuned.model), plain, atol=1e-3)
    assert torch.equal(logits(tuned.model), plain)


def test_every_matrix_is_a_module_of_its_own_with_its_shape(tmp_path: Path) -> None:
    tuned = open_model(save_mixtral(tmp_path / "model"), "q_proj", parameters=EXPERTS)
    found = {name: shape for name, shape in tuned.shapes.items() if "experts" in name}
    assert set(found) == expert_names()
    assert {shape for name, shape in found.items() if "gate_up" in name} == {(40, 24)}
    assert {shape for name, shape in found.items() if "down" in name} == {(24, 20)}


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_plain_peft_loads_the_export_and_computes_the_same(
    parameters: tuple[str, ...], mixture: Path, tmp_path: Path
) -> None:
    tuned = open_model(mixture, "q_proj,v_proj", parameters=parameters)
    merged, adapter = mixed(tuned, 1), random_adapter(tuned, 3, seed=2)
    write_peft(stack([merged, adapter], [1.0, 1.0]), tmp_path / "adapter", "tiny")
    base = AutoModelForCausalLM.from_pretrained(mixture)
    before = logits(base.eval())
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    wanted = logits(plain)
    tuned.merge(merged)
    with tuned.adapted(adapter):
        found = logits(tuned.model)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, rtol=0.1, atol=0.1)
    merged_by_peft = logits(plain.merge_and_unload())
    assert torch.allclose(found, merged_by_peft, rtol=1e-4, atol=1e-4)


def test_the_delta_of_an_expert_is_added_to_that_expert(mixture: Path) -> None:
    tuned = open_model(mixture, "q_proj", parameters=EXPERTS)
    experts = tuned.model.get_submodule("model.layers.1.mlp.experts")
    before = experts.down_proj.detach().clone()
    adapter = mixed(tuned)
    with tuned.adapted(adapter):
        after = experts.down_proj.detach()
    for expert in range(3):
        delta = dense(adapter[f"model.layers.1.mlp.experts.matrices.1.down_proj.{expert}"])
        found = (after - before)[expert].double().numpy()
        wanted = delta.T if found.shape != delta.shape else delta
        assert np.allclose(found, wanted, atol=1e-6), expert


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_training_moves_every_expert_that_sees_a_token(implementation: str, mixture: Path) -> None:
    settings = settings_for(mixture, local__learning_rate=1e-2, local__max_steps=4)
    tuned = open_model(mixture, "q_proj", parameters=EXPERTS)
    tuned.model.set_experts_implementation(implementation)
    start = random_adapter(tuned, 2)
    trained = train(tuned, random_examples(tuned, 8), start, settings.local, seed=1)
    moved = {n for n, f in trained.adapter.items() if not np.array_equal(f.b, start[n].b)}
    assert {name for name in moved if "experts" in name} == expert_names()


def test_the_gradients_are_those_of_peft(mixture: Path, tmp_path: Path) -> None:
    tuned = open_model(mixture, "q_proj", parameters=EXPERTS)
    adapter = random_adapter(tuned, 2)
    write_peft(adapter, tmp_path / "adapter", "tiny")
    base = AutoModelForCausalLM.from_pretrained(mixture).eval()
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    ids = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    plain(input_ids=ids, labels=ids).loss.backward()
    with tuned.adapted(adapter) as slot:
        assert slot is not None
        slot.parameters("both")
        tuned.model(input_ids=ids, labels=ids).loss.backward()
        place = "model.layers.0.mlp.experts"
        layers = tuned.model.get_submodule(f"{place}.matrices.1.down_proj")
        own = torch.cat([layer.lora_A[slot.name].weight.grad for layer in layers])
    theirs = plain.base_model.model.get_submodule(place).lora_A["default"].weight.grad
    assert float(theirs.abs().max()) > 0
    assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (("experts.gate_up",), "'experts.gate_up' matches no parameter of experts .* gate_up_proj"),
        (("router.weight",), "'router.weight' matches no parameter of experts of this model"),
        (("q_proj",), "lora.target-parameters: 'q_proj' matches no parameter of experts"),
    ],
)
def test_a_name_that_matches_no_parameter_gets_the_nearest(
    parameters: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        open_model(save_mixtral(tmp_path / "model"), parameters=parameters)


def test_a_model_without_experts_has_none_to_adapt(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lora.target-parameters=x,y, but this model has no exp"):
        open_model(save_llama(tmp_path / "model"), parameters=("x", "y"))


def test_a_base_in_fewer_bits_would_round_the_deltas_away(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    with pytest.raises(UsageError, match=r"lora.target-parameters needs model.dtype=float32"):
        open_model(folder, dtype="bfloat16", parameters=EXPERTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_odd_sizes_are_computed_one_by_one(dtype: str, tmp_path: Path) -> None:
    """Torch multiplies groups of matrices only where a row takes a multiple of 16 bytes."""
    folder = save_mixtral(tmp_path / "model", intermediate_size=21)
    tuned = open_model(folder, dtype=dtype)
    loss = tuned.evaluate(random_examples(tuned, 4)).loss
    assert 0 < loss < 20
    even = open_model(save_mixtral(tmp_path / "even"))
    assert even.model.config._experts_implementation == "grouped_mm"


def test_the_head_of_a_run_says_what_all_linear_leaves_out(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    assert open_model(folder).left_out == (
        "all-linear leaves out 12 expert matrices (mlp.experts.down_proj, "
        "mlp.experts.gate_up_proj): name them with lora.target-parameters"
    )
    assert (
        "leaves out 6 expert matrices (mlp.experts.down_proj):"
        in open_model(folder, parameters=EXPERTS[:1]).left_out
    )
    assert open_model(folder, parameters=EXPERTS).left_out == ""
    assert open_model(folder, "q_proj").left_out == ""
    assert open_model(save_llama(tmp_path / "llama")).left_out == ""
