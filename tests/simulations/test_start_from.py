"""--start-from: round 0 is base + adapter as PEFT merges them, and a run's export begins a run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.conftest import Run
from tools.rehearsal.tiny_models import save_llama, save_mixtral

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of another rank than the run's, on some of its modules."""
    return saved_adapter(
        tiny_model, tmp_path / "adapter", r=5, target_modules=["q_proj", "up_proj"]
    )


def saved_adapter(base: Path, folder: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_alpha=1, **config),
    )
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapters: Sequence[Path], folder: Path) -> Path:
    """The base with these adapters in its weights, as a base of its own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def records(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]


def unwrapped(out: str) -> str:
    """What was printed, without the frames and line breaks of a terminal."""
    return " ".join(out.replace("│", " ").split())


def held_out(folder: str) -> list[float]:
    return [record["held_out_loss"] for record in records(folder)]


@pytest.mark.parametrize("strategy", ["flora", "flora-warm", "fedex-lora", "frlora", "ideal"])
def test_a_run_begins_from_base_and_adapter(
    strategy: str,
    bouquet: Run,
    small_job: list[str],
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    ranks = "4,2" if strategy in ("flora", "flora-warm", "ideal") else "3,3"
    job = [*small_job, "-s", strategy, "--ranks", ranks, "--lr", "0.02"]
    code, out, err = bouquet(*job, "-o", "run", "--start-from", adapter)
    assert (code, err) == (0, "")
    words = unwrapped(out)
    assert "begins from base + adapter" in words
    assert "rank 5 on 4 modules, made for" in words
    assert "base + adapter" in words[words.index("held-out loss change") :]
    assert "base, as shipped" not in out
    assert bouquet(*job, "-o", "plain")[0] == 0
    whole = merged_by_peft(tiny_model, [adapter], tmp_path / "whole")
    assert bouquet(*job, "-o", "whole-run", "--model", whole)[0] == 0
    found = held_out("run")
    assert found[0] == pytest.approx(held_out("whole-run")[0], abs=2e-5)
    assert abs(found[0] - held_out("plain")[0]) > 1e-3
    if strategy not in ("frlora", "flora-warm"):  # whose starts are directions of it, too
        assert found == pytest.approx(held_out("whole-run"), abs=1e-4)
    exported = merged_by_peft(tiny_model, [Path("run/adapter")], tmp_path / "exported")
    assert bouquet(*job, "-o", "of-export", "--model", exported)[0] == 0
    assert held_out("of-export")[0] == pytest.approx(found[-1], abs=2e-5)
    assert found[-1] < found[0]


def test_a_runs_export_begins_another_run(
    bouquet: Run, small_job: list[str], adapter: Path, tmp_path: Path
) -> None:
    job = [*small_job, "--lr", "0.02"]
    assert bouquet(*job, "-o", "one", "--start-from", adapter)[0] == 0
    assert bouquet(*job, "-o", "two", "--start-from", "one/adapter", "--central")[0] == 0
    assert held_out("two")[0] == pytest.approx(held_out("one")[-1], abs=2e-5)
    central = json.loads(Path("two/central.json").read_text())
    assert central["held_out_loss"] < held_out("two")[0]


def test_a_resumed_run_needs_the_adapter_no_more(
    bouquet: Run, small_job: list[str], adapter: Path, tmp_path: Path
) -> None:
    job = [*small_job, "--start-from", adapter]
    assert bouquet(*job, "-o", "long", "--rounds", "3")[0] == 0
    assert bouquet(*job, "-o", "short")[0] == 0
    shutil.rmtree(adapter)
    code, out, _ = bouquet("simulate", "--resume", "short", "--rounds", "3")
    assert code == 0
    assert "which the saved state holds" in unwrapped(out)
    long, short = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("long", "short")
    )
    assert long == short
    for name in ("long", "short"):  # its central reference begins there, too
        code, _, err = bouquet("simulate", "--resume", name, "--rounds", "3", "--central")
        assert (code, err) == (0, "")
    long, short = (json.loads(Path(name, "central.json").read_text()) for name in ("long", "short"))
    del long["train_seconds"], short["train_seconds"]
    assert long == short


def test_a_comparison_begins_every_method_from_it(
    bouquet: Run, small_job: list[str], adapter: Path
) -> None:
    job = ["compare", *small_job[1:], "-s", "flora,zero-padding,central,local", "--seeds", "1"]
    code, _, err = bouquet(*job, "-o", "comparison", "--start-from", adapter)
    assert (code, err) == (0, "")
    first = [held_out(str(path.parent))[0] for path in Path("comparison").rglob("rounds.jsonl")]
    assert len(first) == 4
    assert first == pytest.approx([first[0]] * 4, abs=1e-6)
    assert bouquet(*job[:-4], "-s", "flora", "--seeds", "1", "-o", "plain")[0] == 0
    plain = held_out(str(next(Path("plain").rglob("rounds.jsonl")).parent))[0]
    assert abs(plain - first[0]) > 1e-3


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--start-from", "nowhere"], "start.adapter names"),
        (
            ["--set", "lora.target-modules=q_proj", "--start-from", "ADAPTER"],
            "adapts modules that this run does not: model.layers.0.mlp.up_proj",
        ),
        (["--start-from", "OTHER"], "it is an adapter of another base"),
        (["--model", "ADAPTER"], "no base model: use --model"),
        (["--model", "MIXTURE", "--set", "lora.target-parameters=down"], "matches no parameter of"),
        (
            [
                *("--model", "MIXTURE", "--set", "lora.target-parameters=experts.down_proj"),
                *("--set", "lora.dropout=0.1"),
            ],
            "lora.dropout=0.1 does not go with lora.target-parameters",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    option: list[str],
    reason: str,
    bouquet: Run,
    small_job: list[str],
    adapter: Path,
    tmp_path: Path,
) -> None:
    names = {"ADAPTER": str(adapter)}
    if "OTHER" in option:
        other = save_llama(tmp_path / "other", hidden_size=16)
        names["OTHER"] = str(saved_adapter(other, tmp_path / "foreign", target_modules=["q_proj"]))
    if "MIXTURE" in option:
        names["MIXTURE"] = str(save_mixtral(tmp_path / "mixture"))
    code, _, err = bouquet(*small_job, *(names.get(word, word) for word in option), "-o", "run")
    assert code == 2
    assert reason in " ".join(err.split())
    assert not Path("run").exists()


def test_a_mixture_says_what_is_left_out_and_trains_its_experts(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    base = save_mixtral(tmp_path / "mixture")
    job = [*small_job, "--model", str(base), "--lr", "0.02", "-s", "flora"]
    code, out, _ = bouquet(*job, "-o", "plain")
    assert code == 0
    words = unwrapped(out)
    assert "all-linear leaves out 12 expert matrices (mlp.experts.down_proj, mlp.experts." in words
    code, out, _ = bouquet(
        *job, "-o", "run", "--set", "lora.target-parameters=mlp.experts.gate_up_proj"
    )
    assert code == 0
    assert "leaves out 6 expert matrices" in out
    whole = merged_by_peft(base, [Path("run/adapter")], tmp_path / "whole")
    assert bouquet(*job, "-o", "of-export", "--model", whole)[0] == 0
    found = held_out("run")
    assert held_out("of-export")[0] == pytest.approx(found[-1], abs=2e-5)
    assert found[-1] < found[0]
    assert bouquet(
        *job, "-o", "again", "--start-from", "run/adapter",
        "--set", "lora.target-parameters=mlp.experts.gate_up_proj",
    )[0] == 0  # fmt: skip
    assert held_out("again")[0] == pytest.approx(found[-1], abs=2e-5)
