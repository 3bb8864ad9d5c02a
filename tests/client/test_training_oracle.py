"""A round equals, to 1e-6, a loop written by hand on PEFT's model: AdamW, clipping, schedule."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from adapters.adapter import Adapter
from client.training import train
from settings.keys import Value
from settings.run import LocalSettings
from tasks.encoding import SHAPE_STEP, Encoded, order_batches
from tools.rehearsal.tiny_models import (
    CONTEXT,
    open_model,
    random_adapter,
    random_examples,
    settings_for,
)

SEED = 11


def peft_model(folder: Path, adapter: Adapter, targets: list[str], dropout: float) -> Any:
    """PEFT's own model, in training mode, with these factors."""
    (scale,) = {factors.scale for factors in adapter.values()}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank * scale,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out="gpt2" in folder.name,
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, factors in adapter.items():
            layer = wrapped.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.from_numpy(factors.a))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(factors.b))
    return wrapped.train()


def padded(examples: list[Encoded]) -> tuple[dict[str, torch.Tensor], int]:
    """A batch as transformers takes it, and how many tokens count in it.

    Dropout draws for every position, so the padding must be ours for the draws to be.
    """
    width = min(SHAPE_STEP * math.ceil(max(len(e.ids) for e in examples) / SHAPE_STEP), CONTEXT)
    ids = torch.zeros((len(examples), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.from_numpy(example.ids)
        mask[row, :length] = 1
        labels[row, example.loss_from : length] = torch.from_numpy(example.ids[example.loss_from :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, int((labels >= 0).sum())


def rate(step: int, steps: int, local: LocalSettings) -> float:
    """The schedule once more, for warm-up shares that divide the steps."""
    warm = round(local.warmup * steps)
    if step < warm:
        return local.learning_rate * (step + 1) / warm
    left = 1.0 - (step - warm) / (steps - warm)
    shape = {"constant": 1.0, "linear": left, "cosine": math.sin(math.pi * left / 2) ** 2}
    return local.learning_rate * shape[local.schedule]


def train_by_hand(
    model: Any, examples: list[Encoded], local: LocalSettings, trains: str
) -> dict[str, torch.Tensor]:
    """AdamW over the LoRA parameters, one step at a time."""
    for name, parameter in model.named_parameters():
        letter = name.partition("lora_")[2][:1]
        parameter.requires_grad_(letter != "" and trains in (letter, "both"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, weight_decay=local.weight_decay, foreach=False, fused=False
    )
    lengths = [len(example.ids) for example in examples]
    groups = []
    for epoch in range(local.epochs):
        order = order_batches(lengths, local.batch_size, SEED + epoch)
        groups += [
            order[i : i + local.accumulation] for i in range(0, len(order), local.accumulation)
        ]
    torch.manual_seed(SEED)
    for step, group in enumerate(groups):
        batches = [padded([examples[i] for i in batch]) for batch in group]
        tokens = sum(count for _, count in batches)
        optimizer.zero_grad()
        for batch, count in batches:
            (model(**batch).loss * count / tokens).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters))
        if local.max_grad_norm and norm > local.max_grad_norm:
            for parameter in parameters:
                parameter.grad *= local.max_grad_norm / (norm + 1e-6)
        optimizer.param_groups[0]["lr"] = rate(step, len(groups), local)
        optimizer.step()
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.detach()
        for name, p in model.named_parameters()
        if "lora_" in name
    }


CASES: dict[str, dict[str, Value]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.05},
    "never clipped": {"max_grad_norm": 0.0},
    "linear, decay": {"schedule": "linear", "weight_decay": 0.3},
    "constant, warm": {"schedule": "constant", "warmup": 0.5},
    "accumulated": {"batch_size": 2, "accumulation": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_is_the_loop_written_by_hand(case: str, model_folder: Path) -> None:
    check(model_folder, CASES[case])


@pytest.mark.parametrize("trains", ["A", "B"])
def test_so_is_a_round_that_trains_one_factor(trains: str, model_folder: Path) -> None:
    check(model_folder, {}, trains=trains)


def test_so_is_a_round_with_dropout(model_folder: Path) -> None:
    check(model_folder, {}, dropout=0.25)


def check(
    folder: Path, values: dict[str, Value], trains: str = "both", dropout: float = 0.0
) -> None:
    pinned: dict[str, Value] = {
        "local__batch_size": 4,
        "local__epochs": 2,
        "local__warmup": 0.25,
        "local__learning_rate": 1e-3,
    }
    named = {f"local__{name}": value for name, value in values.items()}
    local = settings_for(folder, **(pinned | named)).local
    tuned = open_model(folder)
    start, examples = random_adapter(tuned, 3), random_examples(tuned, 14)
    found = train(tuned, examples, start, local, SEED, trains, dropout).adapter
    model = peft_model(folder, start, tuned.targets, dropout)
    wanted = train_by_hand(model, examples, local, trains)
    moved = 0.0
    for name, factors in found.items():
        for letter, got, old in (("A", factors.a, start[name].a), ("B", factors.b, start[name].b)):
            expected = wanted[f"{name}.lora_{letter}"].numpy()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6, err_msg=f"{name} {letter}")
            moved = max(moved, float(np.abs(expected - old).max()))
    assert moved > 1e-3  # a thousand times what the two may differ by
