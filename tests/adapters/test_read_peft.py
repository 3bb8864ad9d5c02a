"""`read_peft` against PEFT: what PEFT saved and merges is the delta that is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.adapter import Adapter
from adapters.peft_files import read_peft, write_peft
from core.errors import UsageError
from tests.dense_oracle import dense
from tools.rehearsal.tiny_models import (
    open_model,
    random_adapter,
    random_head,
    save_gpt2,
    save_llama,
    save_mixtral,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "all": {"r": 2, "lora_alpha": 32, "target_modules": "all-linear"},
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 3, "up_proj": 7},
        "alpha_pattern": {r"0\.self_attn\.k_proj": 1, "^model.layers.1.self_attn.q_proj": 40},
    },
    "eva": {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["o_proj"]},
}


def saved(model: Any, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """PEFT saves random factors for this model; the weights after it has merged them."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload()
    return {name: values.clone() for name, values in merged.state_dict().items()}


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
def test_it_is_what_peft_merges(kind: str, stored: str, llama_folder: Path, tmp_path: Path) -> None:
    before = load(llama_folder).state_dict()
    after = saved(load(llama_folder), tmp_path, **KINDS[kind])
    if stored != "float32":
        after = restored(tmp_path, llama_folder, getattr(torch, stored))
    shapes = open_model(llama_folder).shapes
    found = read_peft(tmp_path, shapes)
    assert list(found.adapter) == sorted(shapes)
    changed = {n.removesuffix(".weight") for n in after if not torch.equal(after[n], before[n])}
    assert {name for name, f in found.adapter.items() if f.rank} == changed
    assert found.modules == len(changed) > 0
    for name in changed:
        key = f"{name}.weight"
        delta = (after[key].double() - before[key].double()).numpy()
        wrong = np.linalg.norm(dense(found.adapter[name]) - delta)
        assert wrong <= 2e-6 * np.linalg.norm(delta), name


def restored(folder: Path, base: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The adapter stored in this format, and what PEFT makes of that in float32."""
    file = folder / "adapter_model.safetensors"
    save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file)
    adapted = peft.PeftModel.from_pretrained(load(base), folder, autocast_adapter_dtype=True)
    merged: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return merged


def test_of_gpt2_whose_matrices_lie_the_other_way_round(tmp_path: Path) -> None:
    base = save_gpt2(tmp_path / "gpt2")
    before = load(base).state_dict()
    after = saved(
        load(base), tmp_path / "adapter", r=3, target_modules=["c_attn"], fan_in_fan_out=True
    )
    found = read_peft(tmp_path / "adapter", open_model(base).shapes).adapter
    for layer in (0, 1):
        name = f"transformer.h.{layer}.attn.c_attn"
        delta = (after[f"{name}.weight"] - before[f"{name}.weight"]).double().numpy().T
        assert np.allclose(dense(found[name]), delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["mlp.experts.down_proj"]])
def test_of_experts(targets: list[str], tmp_path: Path) -> None:
    base = save_mixtral(tmp_path / "mixtral")
    before = load(base).state_dict()
    after = saved(
        load(base),
        tmp_path / "adapter",
        r=2,
        target_modules=["q_proj"],
        target_parameters=targets,
        lora_alpha=6,
    )
    tuned = open_model(base, "q_proj", parameters=("gate_up_proj", "down_proj"))
    found = read_peft(tmp_path / "adapter", tuned.shapes)
    assert found.modules == 2 + len(targets) * 2 * 3
    for place, name in enumerate(("gate_up_proj", "down_proj")):
        key = f"model.layers.1.mlp.experts.{name}"
        deltas = (after[key] - before[key]).double().numpy()
        for expert, delta in enumerate(deltas):
            module = f"model.layers.1.mlp.experts.matrices.{place}.{name}.{expert}"
            assert np.allclose(dense(found.adapter[module]), delta, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        UsageError, match=r"adapts the parameter .*_proj, which .*lora.target-param"
    ):
        read_peft(tmp_path / "adapter", open_model(base, "q_proj").shapes)


def same(x: Adapter, y: Adapter) -> bool:
    return all(np.allclose(dense(x[n]), dense(y[n]), rtol=1e-5, atol=1e-6) for n in y)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tuned = open_model(
        save_mixtral(tmp_path / "m"), "q_proj,v_proj", parameters=("gate_up_proj", "down_proj")
    )
    adapter = random_adapter(tuned, 3)
    write_peft(adapter, tmp_path / "adapter", "some/base")
    found = read_peft(tmp_path / "adapter", tuned.shapes)
    assert found.base_model == "some/base"
    assert found.adapter.shapes == adapter.shapes
    assert same(found.adapter, adapter)


def test_a_head_comes_along_where_the_run_trains_one(bert_folder: Path, tmp_path: Path) -> None:
    labels = ("no", "yes, please", "who knows")
    tuned = open_model(bert_folder, labels=labels)
    head = random_head(tuned)
    write_peft(random_adapter(tuned, 2), tmp_path, "bert", head, labels)
    found = read_peft(tmp_path, tuned.shapes, tuned.head_shapes, labels).head
    assert set(found) == set(head)
    assert all(np.array_equal(found[name], head[name]) for name in head)
    with pytest.raises(
        UsageError, match=r"holds more than factors: classifier.bias, classifier.we"
    ):
        read_peft(tmp_path, tuned.shapes)
    other = {name: (*shape[:-1], shape[-1] + 1) for name, shape in tuned.head_shapes.items()}
    with pytest.raises(UsageError, match="its head differs from this run's in"):
        read_peft(tmp_path, tuned.shapes, other)
    with pytest.raises(
        UsageError, match=r"classes no, yes, please, .* set data.labels to the same"
    ):
        read_peft(tmp_path, tuned.shapes, tuned.head_shapes, labels[::-1])


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama, as PEFT saves it."""
    saved(load(llama_folder), tmp_path / "adapter", **KINDS["plain"])
    return tmp_path / "adapter"


Change = Callable[[Path], object]


def config(**entries: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)

    return change


def pickled(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def no_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def a_base(folder: Path) -> None:
    (folder / "adapter_config.json").rename(folder / "config.json")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, "start.adapter names .*, which is no folder: expected a folder"),
    "no adapter": (no_adapter, "which is no adapter: expected a folder with adapter_config.json"),
    "a base model": (a_base, "which is a base model: expected a folder with adapter_config.json"),
    "torn": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter_config.json cannot be read",
    ),
    "another kind": (config(peft_type="LOHA"), "adapters of peft_type LORA; this is 'LOHA'"),
    "dora": (config(use_dora=True), r"its delta is not B A alone \(use_dora\)"),
    "biases": (config(bias="all"), r"its delta is not B A alone \(bias=all\)"),
    "tokens": (config(trainable_token_indices=[1]), r"alone \(trainable_token_indices\)"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "which changed the base as well: save it"),
    "olora": (config(init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "a pickle": (pickled, "only adapter_model.bin: a pickle can run code as it is read"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors; it holds README.md, adapter_config.json",
    ),
    "cut": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1" * 40),
        "adapter_model.safetensors cannot be read",
    ),
    "one factor": (tensors(lambda w: w.pop(Q)), "only one of the two factors of model.layers.0"),
    "whole layers": (
        tensors(lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
        "holds more than factors: lm_head.weight, which this run does not train",
    ),
    "not finite": (tensors(lambda w: w[Q].fill_(torch.nan)), "values that are not finite, in base"),
    "whole numbers": (
        tensors(lambda w: w.update({Q: w[Q].int()})),
        "is stored as I32, which is no",
    ),
    "another rank": (config(r=3), "says rank 3 for model.layers.0.* but its factors have 4"),
    "another shape": (
        tensors(lambda w: w.update({Q: torch.ones(4, 9)})),
        "the delta of model.layers.0.self_attn.q_proj is 24 x 9, .* matrix 24 x 24: it is an ad",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_no_run_can_begin_from_is_refused_with_the_reason(
    fault: str, folder: Path, llama_folder: Path
) -> None:
    change, reason = REFUSED[fault]
    shapes = open_model(llama_folder).shapes
    assert read_peft(folder, shapes).modules == 4
    change(folder)
    with pytest.raises(UsageError, match=reason):
        read_peft(folder, shapes)


def test_a_module_that_the_run_does_not_adapt_is_named(folder: Path, llama_folder: Path) -> None:
    expected = (
        r"adapts modules that this run does not: model.layers.0.mlp.down_proj, model.lay.*: .*"
    )
    with pytest.raises(UsageError, match=expected + llama_folder.name) as refusal:
        read_peft(folder, open_model(llama_folder, "q_proj").shapes)
    assert "Name them with lora.target-modules" in str(refusal.value)


def test_an_unknown_base_is_not_invented(tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", hidden_size=16)
    saved(load(other), tmp_path / "adapter", **KINDS["plain"])
    config(base_model_name_or_path=None)(tmp_path / "adapter")
    assert read_peft(tmp_path / "adapter", open_model(other).shapes).base_model == ""
