"""The exported adapter, loaded by plain PEFT and transformers, is the simulator's global model."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from settings.run import run_settings
from tasks.partition import global_held_out
from tests.conftest import Run


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("flora", "6,3"), ("zero-padding", "6,3"), ("fedavg", "3")]
)
def test_its_held_out_loss_is_the_simulators_own(
    bouquet: Run,
    small_job: list[str],
    tiny_model: Path,
    tmp_path: Path,
    strategy: str,
    ranks: str,
) -> None:
    job = [*small_job, "--strategy", strategy, "--ranks", ranks, "-n", "2", "--lr", "0.02"]
    assert bouquet(*job, "-o", "run")[0] == 0
    records = [json.loads(line) for line in Path("run/rounds.jsonl").read_text().splitlines()]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    loss = plain_loss(model, tokenizer, Path("run/config.toml"))
    assert loss == pytest.approx(records[-1]["held_out_loss"], abs=1e-5)
    with model.disable_adapter():
        before = plain_loss(model, tokenizer, Path("run/config.toml"))
    assert before == pytest.approx(records[0]["held_out_loss"], abs=1e-5)
    assert abs(before - loss) > 1e-3


def plain_loss(model: torch.nn.Module, tokenizer: object, config: Path) -> float:
    """One example at a time, transformers' own loss, weighted by its number of targets."""
    from journal.run_folder import read_config

    settings = run_settings({**read_config(config), "output": ""})
    held_out = global_held_out(settings.data, settings.clients.count, settings.seed, 0)
    total = tokens = 0.0
    for example in held_out:
        prompt = tokenizer(example.prompt + "\n")["input_ids"]  # type: ignore[operator]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])  # type: ignore[attr-defined]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        count = ids.shape[1] - len(prompt)
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens
