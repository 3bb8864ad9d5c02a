"""The model that trains, is evaluated and is exported is the one that the server holds.

For each number format of the base: the server's held-out loss after the last round is that of plain
PEFT on the same base with the exported adapter, and of a quantized base also on the floats that
transformers takes its codes for.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from simulations.simulate import simulate
from tests.simulations.test_exported_adapter import plain_loss
from tools.rehearsal.tiny_models import FORMATS, save_llama, settings_for

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3, "int8": 1e-5, "nf4": 1e-5}
"""The parts of int8 and nf4 bases that are not packed are in float32 here."""


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every matrix has multiples of 64 rows and columns, as bitsandbytes' own 4-bit kernel asks."""
    return save_llama(
        tmp_path_factory.mktemp("wide"),
        hidden_size=64,
        intermediate_size=128,
        num_key_value_heads=4,
    )


def plain_base(folder: Path, dtype: str, quantization: str) -> Any:
    """The base in this format, by transformers and bitsandbytes alone."""
    number = getattr(torch, dtype)
    how: dict[str, Any] = {}
    if quantization != "none":
        packed = {
            "int8": {"load_in_8bit": True},
            "nf4": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": number,
            },
        }[quantization]
        config = transformers.BitsAndBytesConfig(**packed)
        how = {"quantization_config": config, "device_map": {"": "cpu"}}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=number, **how)


def plain_model(base: Any, adapter: Path) -> Any:
    """PEFT's own model; bitsandbytes' layers compute from the weights, as they do in training."""
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    return model


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("flora", "4,2"), ("flora-warm", "4,2"), ("fedex-lora", "3"), ("frlora", "3")],
)
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_servers_loss_is_that_of_plain_peft_on_the_same_base(
    name: str, strategy: str, ranks: str, wide_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    dtype, quantization = FORMATS[name]
    settings = settings_for(
        wide_model,
        strategy__name=strategy,
        model__dtype=dtype,
        model__quantization=quantization,
        data__path=str(tiny_data),
        data__context=48,
        clients__count=2,
        lora__rank=ranks,
        local__max_steps=4,
        local__batch_size=8,
        local__learning_rate=0.03,
        rounds=3,
        evaluate__every=3,
        data__held_out="0.5",  # of few tokens a bfloat16 that rounds the other way is seen
        output=str(tmp_path / "run"),
    )
    simulate(settings)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    served = json.loads(lines[-1])["held_out_loss"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(wide_model)

    def loss(model: Any) -> float:
        return plain_loss(model, tokenizer, tmp_path / "run" / "config.toml")

    base = plain_base(wide_model, dtype, quantization)
    model = plain_model(base, tmp_path / "run" / "adapter")
    found = loss(model)
    assert found == pytest.approx(served, rel=TOLERANCES[name])
    with model.disable_adapter():
        assert loss(model) > 2 * found  # what was learned is most of it
    if quantization != "none":
        floats = plain_base(wide_model, dtype, quantization).dequantize()
        exact = loss(plain_model(floats, tmp_path / "run" / "adapter"))
        assert exact == pytest.approx(served, rel=TOLERANCES[name])
