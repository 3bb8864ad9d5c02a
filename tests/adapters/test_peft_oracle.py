"""PEFT as an independent oracle: its "cat" combination is `stack`, its scaling is ours."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.adapter import Adapter, Factors
from adapters.algebra import stack
from adapters.refactoring import refactor
from tests.dense_oracle import Dense, dense, double

SHAPES = {"wide": (6, 20), "tall": (20, 6), "block.wide": (7, 9)}
WEIGHTS = [0.2, 0.5, 0.05, 0.25]
CLIENTS = {  # rank, alpha, and a rank and alpha of its own for one module
    "one": (4, 16.0, {"tall": (6, 7.0)}),
    "two": (1, 3.0, {"wide": (20, 50.0)}),
    "three": (9, 9.0, {"block.wide": (7, 2.0)}),
    "four": (6, 0.5, {}),
}


def tiny_model() -> torch.nn.Module:
    """Three bare linear layers under the names of SHAPES."""
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    for name, (m, n) in SHAPES.items():
        parent = model.block if name.startswith("block.") else model
        parent.add_module(name.removeprefix("block."), torch.nn.Linear(n, m, bias=False))
    return model


def lora_config(client: str, rslora: bool) -> LoraConfig:
    rank, alpha, own = CLIENTS[client]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{name}": r for name, (r, _) in own.items()},
        alpha_pattern={f"^{name}": a for name, (_, a) in own.items()},
        target_modules=list(SHAPES),
        use_rslora=rslora,
        init_lora_weights=False,  # B random, too
    )


@pytest.fixture(params=[False, True], ids=["alpha/r", "rslora"])
def rslora(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def federation(rslora: bool) -> PeftModel:
    """One PEFT model that carries every client's adapter under the client's name."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), lora_config("one", rslora), adapter_name="one")
    for client in list(CLIENTS)[1:]:
        model.add_adapter(client, lora_config(client, rslora))
    return model


def taken_from(model: PeftModel, client: str, rslora: bool) -> Adapter:
    """PEFT's factors with the scale from the formula, not from PEFT."""
    rank, alpha, own = CLIENTS[client]
    modules = {}
    for name in SHAPES:
        layer = model.base_model.model.get_submodule(name)
        r, a = own.get(name, (rank, alpha))
        rows, columns = (
            half[client].weight.detach().numpy() for half in (layer.lora_A, layer.lora_B)
        )
        modules[name] = Factors(rows, columns, a / r**0.5 if rslora else a / r)
        assert modules[name].rank == r
    return Adapter(modules)


def peft_delta(model: PeftModel, name: str, adapter: str) -> Dense:
    layer = model.base_model.model.get_submodule(name)
    return double(layer.double().get_delta_weight(adapter).detach().numpy())


def test_a_delta_is_what_peft_adds(federation: PeftModel, rslora: bool) -> None:
    adapter = taken_from(federation, "two", rslora)
    for name, factors in adapter.items():
        expected = peft_delta(federation, name, "two")
        assert np.allclose(dense(factors), expected, rtol=1e-9, atol=1e-12)


def test_stack_is_what_peft_calls_cat(federation: PeftModel, rslora: bool) -> None:
    adapters = [taken_from(federation, client, rslora) for client in CLIENTS]
    federation.add_weighted_adapter(list(CLIENTS), WEIGHTS, "mean", combination_type="cat")
    stacked = stack(adapters, WEIGHTS)
    for name in SHAPES:
        # PEFT 0.21 scales its result again where its sources are rsLoRA (huggingface/peft#3449).
        scaling = federation.base_model.model.get_submodule(name).scaling["mean"]
        expected = peft_delta(federation, name, "mean") / scaling
        for ours in (stacked[name], refactor(stacked).adapter[name]):
            assert np.linalg.norm(dense(ours) - expected) <= 1e-6 * np.linalg.norm(expected)
