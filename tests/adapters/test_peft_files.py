"""`write_peft` and PEFT's own loader and merge: exactly W + delta, module for module."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.adapter import Adapter, Delta, Dense, FloatArray
from adapters.peft_files import write_peft
from core.errors import AdapterError
from tests.adapter_generators import make_factors
from tests.dense_oracle import dense, double

# PEFT 0.21 asks transformers 5 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

LAYER = "model.layers.{}.self_attn.{}_proj"
RANKS = {
    LAYER.format(1, "q"): (3, 0.5),
    LAYER.format(11, "q"): (5, 4.0),  # layers.1 is its prefix
    LAYER.format(0, "k"): (12, 1.0),  # more than the module's 8 rows
    LAYER.format(2, "v"): (0, 2.0),
    LAYER.format(3, "o"): (1, -0.25),
    "model.layers.1.mlp.down_proj": (16, 16 / 16**0.5),  # a rank equal to a dimension
    "lm_head": (2, 3.0),
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


NESTED = ("block.block.proj", "block.proj", "lone.proj", "proj", "proj_2", "zone.block.proj")


class Nested(torch.nn.Module):
    """Names of which one ends another, sorted before it or behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = torch.nn.Linear(5, 7, bias=False)
        self.proj_2 = torch.nn.Linear(5, 7, bias=False)
        self.block = torch.nn.Module()
        self.block.proj = torch.nn.Linear(9, 6, bias=False)
        self.block.block = torch.nn.Module()
        self.block.block.proj = torch.nn.Linear(4, 4, bias=False)
        self.lone = torch.nn.Module()
        self.lone.proj = torch.nn.Linear(3, 8, bias=False)
        self.zone = torch.nn.Module()
        self.zone.block = torch.nn.Module()
        self.zone.block.proj = torch.nn.Linear(5, 5, bias=False)
        self.config = {"tie_word_embeddings": False}

    def prepare_inputs_for_generation(self) -> None:
        """PEFT looks for it and does not call it."""


def adapter_for(model: torch.nn.Module, ranks: dict[str, tuple[int, float]]) -> Adapter:
    rng = np.random.default_rng(1)
    modules = {}
    for name, (rank, scale) in ranks.items():
        (m, n) = weights(model)[f"{name}.weight"].shape
        modules[name] = make_factors(rng, (m, n), rank, scale)
    return Adapter(modules)


def weights(model: torch.nn.Module) -> dict[str, FloatArray]:
    return {key: value.numpy().copy() for key, value in model.state_dict().items()}


def assert_peft_adds(adapter: Delta, model: torch.nn.Module, folder: Path) -> None:
    """Loaded and merged by PEFT, the model has W + delta in these modules and W elsewhere."""
    before = weights(model)
    write_peft(adapter, folder, base_model="tiny")
    after = weights(PeftModel.from_pretrained(model, folder).merge_and_unload())
    assert list(after) == list(before)
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        if name not in adapter:
            assert np.array_equal(after[key], weight)
            continue
        expected = double(weight) + dense(adapter[name])
        assert np.linalg.norm(after[key] - expected) <= 2e-7 * np.linalg.norm(expected)
        assert np.allclose(after[key], expected, rtol=1e-5, atol=1e-5)


def test_peft_loads_and_merges_exactly_the_delta(tmp_path: Path) -> None:
    model = tiny_llama()
    assert_peft_adds(adapter_for(model, RANKS), model, tmp_path / "new" / "folder")


def test_a_dense_module_is_written_in_factors_of_its_full_rank(tmp_path: Path) -> None:
    model = tiny_llama()
    factors, name = adapter_for(model, RANKS), LAYER.format(0, "k")
    delta = Delta({**factors, name: Dense(dense(factors[name]).astype(np.float32))})
    assert_peft_adds(delta, model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert max(config["rank_pattern"].values()) == 16


def test_the_loaded_model_computes_what_the_changed_weights_compute(tmp_path: Path) -> None:
    model, changed = tiny_llama(), tiny_llama()
    adapter = adapter_for(model, RANKS)
    for name, factors in adapter.items():
        changed.get_submodule(name).weight.data += torch.from_numpy(dense(factors)).float()
    write_peft(adapter, tmp_path, base_model="tiny")
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, found = changed(tokens).logits, loaded(tokens).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, tiny_llama()(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "ranks",
    [
        dict.fromkeys(NESTED, (3, 2.0)),
        {name: (rank, 1.0 + rank) for rank, name in enumerate(NESTED)},
        {name: (rank, 1.0 + rank) for rank, name in enumerate(reversed(NESTED))},
        dict.fromkeys(NESTED, (0, 1.0)),
        {"block.block.proj": (5, 8.0)},
    ],
)
def test_a_name_that_ends_another_is_not_mistaken_for_it(
    ranks: dict[str, tuple[int, float]], tmp_path: Path
) -> None:
    model = Nested()
    assert_peft_adds(adapter_for(model, ranks), model, tmp_path)


def test_the_same_adapter_gives_the_same_files(tmp_path: Path) -> None:
    adapter = adapter_for(tiny_llama(), RANKS)
    for folder in ("a", "b"):
        write_peft(adapter, tmp_path / folder, base_model="hub/name")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "hub/name"
    assert sorted(config["target_modules"]) == sorted(RANKS)


def test_an_adapter_of_rank_0_names_no_rank_that_peft_refuses(tmp_path: Path) -> None:
    write_peft(adapter_for(tiny_llama(), {"lm_head": (0, 1.0)}), tmp_path, base_model="tiny")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)


def test_an_adapter_without_modules_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no module in this adapter: nothing to write"):
        write_peft(Adapter({}), tmp_path / "folder", base_model="tiny")
    assert not (tmp_path / "folder").exists()
