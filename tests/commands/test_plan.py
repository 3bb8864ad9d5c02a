"""What a run says before it starts: what its examples lose on their way into tokens."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM

from commands.display import plan_panel
from core.errors import UsageError
from settings.keys import Value
from settings.run import RunSettings
from simulations.simulate import prepare
from tools.rehearsal.tiny_models import settings_for

ROWS = [
    *({"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(16)),
    {"prompt": "long", "response": "0123456789" * 20},
    {"prompt": "longer" * 20, "response": "short"},
    {"prompt": "nothing", "response": ""},
    {"prompt": "What ends </s> a text?", "response": "</s>"},
]


def settings(folder: Path, file: Path, **values: Value) -> RunSettings:
    pinned: dict[str, Value] = {
        "data__path": str(file),
        "data__held_out": "0",
        "data__client_held_out": "0",
        "clients__count": 2,
        "lora__rank": "2",
        "evaluate__server": False,
    }
    return settings_for(folder, **(pinned | values))


def test_the_header_counts_each_reason_under_its_own_name(
    llama_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    run = settings(llama_folder, file)
    plan = prepare(run)
    assert plan.counts == {
        "cut": 1,
        "shortened-prompt": 1,
        "empty": 1,
        "special-tokens": 1,
    }
    lines = [
        "1 example: the end is cut off at data.context=64 tokens",
        "1 example: the prompt is cut off at data.max-prompt=32 tokens",
        "1 example: left out, the response or text is empty",
        "1 example: special tokens of the tokenizer in what the data say, read as plain text",
    ]
    console = Console(record=True, width=200)
    console.print(plan_panel(run, plan, "title"))
    text = console.export_text()
    assert all(line in text for line in lines)


def test_checkpointing_that_a_model_cannot_do_is_refused_before_the_run(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="is set, but LlamaForCausalLM cannot compute its"):
        prepare(settings(llama_folder, file, local__checkpointing=True))
