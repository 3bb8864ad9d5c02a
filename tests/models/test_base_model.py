"""A base model is loaded whole, frozen and known by its weights, or refused with a reason."""

import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.adapter import draw
from adapters.peft_files import write_peft
from core.errors import UsageError
from models import base_model
from models.base_model import choose_device, embedded_model_path, load_base_model
from models.targets import find_target_modules
from tools.rehearsal.tiny_models import CONTEXT, open_model, save_llama

Change = Callable[[Path], object]


def load(folder: Path, dtype: str = "float32") -> base_model.BaseModel:
    return load_base_model(str(folder), dtype, "cpu")


def set_config(**entries: object) -> Change:
    """A change of config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return change


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def only_empty_tensors(folder: Path) -> None:
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})


def as_code_in_a_pickle(folder: Path) -> None:
    """A checkpoint in torch's own format that would run code as it is read."""
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Thief(folder / "stolen")}, folder / "pytorch_model.bin")


class Thief:
    """Writes a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to do harm to."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def test_a_model_comes_frozen_and_in_evaluation_mode(model_folder: Path) -> None:
    base = load(model_folder)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.training for module in base.model.modules())
    assert base.path == str(model_folder)
    assert base.context == CONTEXT


def test_the_weights_are_those_on_disk(llama_folder: Path) -> None:
    on_disk = load_file(llama_folder / "model.safetensors")
    loaded = load(llama_folder).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_format_is_that_asked_for(dtype: str, llama_folder: Path) -> None:
    model = load(llama_folder, dtype).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_without_a_padding_token_the_end_token_pads(gpt2_folder: Path, llama_folder: Path) -> None:
    tokenizer = load(gpt2_folder).tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert load(llama_folder).tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            remove("model.safetensors"),
            "no causal .* loaded from .*: Error no file named model.safe",
        ),
        (cut_weights, "no causal .* loaded from .*: Error while deserializing header"),
        (remove("tokenizer.json", "tokenizer_config.json"), "no causal .* tokenizer"),
        (remove("config.json"), r"holds no model: expected config.json, safetensors weights and"),
        (write("config.json", "{"), r"its configuration cannot be read: .* not a valid JSON file"),
        (write("config.json", "[]"), r"its configuration cannot be read: "),
        (write("model.safetensors", ""), r"its weights cannot be read: "),
        (write("tokenizer.json", "{"), r"its tokenizer cannot be read: "),
        (only_empty_tensors, r"is not whole: its weights lack .*of 21\)"),
        (as_code_in_a_pickle, r"its weights cannot be read: .*[Ww]eights.only"),
        (set_config(model_type="nosuch"), "no causal .*: The checkpoint .* type `nosuch`"),
        (set_config(intermediate_size=48), "no causal language model can be loaded"),
        (set_config(num_hidden_layers=3), r"is not whole: its weights lack model.layers.2.*of 9"),
        (
            set_config(architectures=["LlamaModel"]),
            r"is not a causal .*: its config names LlamaMod",
        ),
    ],
    ids=[
        *("weights", "cut", "tokenizer", "config", "torn", "list", "empty", "tokenizer-torn"),
        *("no-tensors", "pickle", "type", "shape", "layers", "headless"),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(
    change: Change, reason: str, copied: Path
) -> None:
    change(copied)
    with pytest.raises(UsageError, match=reason):
        load(copied)
    assert not (copied / "stolen").exists()


def test_weights_in_torchs_own_format_are_read_without_code(copied: Path) -> None:
    wanted = load(copied)
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert load(copied).identity == wanted.identity


CUSTOM = {
    "model_type": "own",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    "architectures": ["OwnForCausalLM"],
}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *arguments, **named):
        return super().forward(*arguments, **named)  # {remark}
"""


def with_code(folder: Path, remark: str) -> Path:
    set_config(**CUSTOM)(folder)
    (folder / "own.py").write_text(CODE.replace("{remark}", remark))
    return folder


def test_code_that_a_model_brings_along_runs_only_where_it_is_trusted(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    with_code(copied, "a")
    expected = r"brings its own Python code, .* set model.trust-remote-code=true \(a site: also"
    with pytest.raises(UsageError, match=expected):
        load(copied)
    base = load_base_model(str(copied), "float32", "cpu", trust_remote_code=True)
    assert type(base.model).__name__ == "OwnForCausalLM"


def test_other_code_is_another_base(copied: Path, tmp_path: Path) -> None:
    found = {
        remark: load_base_model(str(folder), "float32", "cpu", trust_remote_code=True).identity
        for remark, folder in (
            ("a", with_code(copied, "a")),
            ("same", with_code(Path(shutil.copytree(copied, tmp_path / "same")), "a")),
            ("other", with_code(Path(shutil.copytree(copied, tmp_path / "other")), "b")),
        )
    }
    assert found["a"] == found["same"] != found["other"]


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(copied: Path) -> None:
    rows = load(copied).model.get_input_embeddings().weight.shape[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(copied)
    expected = rf"knows 2 tokens more than the model's embedding, which has {rows} rows: <one>, <tw"
    with pytest.raises(UsageError, match=expected):
        load(copied)


def test_an_adapter_folder_is_said_to_be_one(tmp_path: Path) -> None:
    write_peft(draw({"q": (3, 4)}, 2, 0, 1.0), tmp_path / "adapter", "hub/base")
    with pytest.raises(UsageError, match="is an adapter of hub/base, no base model: use --model h"):
        load(tmp_path / "adapter")


def test_a_model_that_is_not_causal_is_refused(bert_folder: Path) -> None:
    expected = r"its config names BertModel \(model_type bert\). Expected a ...ForCausalLM"
    with pytest.raises(UsageError, match=expected):
        load(bert_folder)


def test_a_head_that_is_not_in_the_weights_is_not_invented(
    bert_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "bert"))
    set_config(architectures=None)(folder)
    with pytest.raises(UsageError, match=r"is not whole: its weights lack cls.predictions"):
        load(folder)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_folder_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(UsageError, match=f"model.path names '{path}', where there is no folder"):
        load_base_model(path, "float32", "cpu")


def test_a_hub_id_that_is_not_at_hand_is_named() -> None:
    with pytest.raises(UsageError, match=r"no model 'nobody/nothing': .* not in the hub's cache"):
        load_base_model("nobody/nothing", "float32", "cpu")


def test_two_loads_have_one_identity(model_folder: Path) -> None:
    assert load(model_folder).identity == load(model_folder).identity


def test_any_tensor_of_other_values_is_another_identity(copied: Path) -> None:
    identity = load(copied).identity
    weights = load_file(copied / "model.safetensors")
    for name, tensor in weights.items():
        save_file(
            {**weights, name: tensor + 0.01},
            copied / "model.safetensors",
            metadata={"format": "pt"},
        )
        assert load(copied).identity != identity, name


def test_another_model_of_the_same_shapes_is_another_identity(
    llama_folder: Path, tmp_path: Path
) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    same = save_llama(tmp_path / "same", seed=0)
    assert load(other).identity != load(llama_folder).identity
    assert load(same).identity == load(llama_folder).identity


def test_all_linear_is_every_linear_layer_but_the_head(
    llama_folder: Path, gpt2_folder: Path
) -> None:
    llama = find_target_modules(load(llama_folder).model, "all-linear")
    attention = [f"self_attn.{letter}_proj" for letter in "koqv"]
    mlp = [f"mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert llama == [f"model.layers.{i}.{name}" for i in (0, 1) for name in sorted(attention + mlp)]
    gpt2 = find_target_modules(load(gpt2_folder).model, "all-linear")
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert gpt2 == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in names]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (
            "up_proj, model.layers.1.self_attn.v_proj",
            ["0.mlp.up_proj", "1.mlp.up_proj", "1.self_attn.v_proj"],
        ),
        ("mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj"]),
    ],
)
def test_a_name_stands_for_each_layer_that_it_ends(
    targets: str, found: list[str], llama_folder: Path
) -> None:
    modules = find_target_modules(load(llama_folder).model, targets)
    assert modules == [f"model.layers.{name}" for name in found]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_porj", "'q_porj' matches no linear layer of this model; the nearest are q_proj"),
        ("q_proj,qv", "'qv' matches no linear layer"),
        ("proj", "'proj' matches no linear layer"),  # a part of a name is not a name
        ("embed_tokens", "'embed_tokens' matches no linear layer"),
        ("q_proj,", "'' matches no linear layer of this model; the nearest are down_proj, gate_p"),
    ],
)
def test_a_name_that_matches_nothing_gets_the_nearest(
    targets: str, message: str, llama_folder: Path
) -> None:
    with pytest.raises(UsageError, match=f"^lora.target-modules: {message}.* All of them: all-lin"):
        open_model(llama_folder, targets)


def test_a_device_is_one_that_torch_knows_and_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="device must be auto, cpu, cuda or cuda:N; got 'gpu'"):
        choose_device("gpu")
    with pytest.raises(UsageError, match="device cuda:1 was asked for, but torch sees no CUDA"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    with pytest.raises(UsageError, match="but torch sees 2 CUDA devices here, cuda:0 to cuda:1: t"):
        choose_device("cuda:7")


@pytest.mark.parametrize("name", ["xpu", "meta", "mps", "hpu", "vulkan"])
def test_a_device_that_is_not_on_this_machine_is_named(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UsageError, match=f"device {name} was asked for, but torch finds none on "):
        choose_device(name)


def test_the_embedded_model_is_the_first_whose_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, installed, other = (tmp_path / name for name in ("bundle", "installed", "other"))
    for root in (bundle, installed, other):
        (root / "tasks" / "stdlib_lm").mkdir(parents=True)
    (bundle / "tasks" / "stdlib_lm" / "config.json").touch()  # code and no weights
    for root in (installed, other):
        (root / "tasks" / "stdlib_lm" / "model.safetensors").touch()
    monkeypatch.setattr(base_model, "_project_roots", lambda: iter([bundle, installed, other]))
    assert embedded_model_path() == installed / "tasks" / "stdlib_lm"
    monkeypatch.setattr(base_model, "_project_roots", lambda: iter([bundle]))
    with pytest.raises(UsageError, match="is not beside the code and bouquet is not installed he"):
        embedded_model_path()


class Installed:
    """What importlib.metadata knows of an editable install in a folder with a space."""

    def locate_file(self, path: str) -> str:
        return f"/site-packages/{path}"

    def read_text(self, name: str) -> str:
        assert name == "direct_url.json"
        return '{"url": "file:///home/of%20someone/bouquet", "dir_info": {"editable": true}}'


def test_an_installed_projects_folder_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    beside, *installed = list(base_model._project_roots())
    assert (beside / "models" / "base_model.py").is_file()
    assert installed == [Path("/site-packages/bouquet/app"), Path("/home/of someone/bouquet")]

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    roots: Iterator[Path] = base_model._project_roots()
    assert list(roots) == [beside]


@pytest.mark.embedded
def test_smoke_the_embedded_model_knows_python() -> None:
    base = load_base_model("embedded", "float32", "cpu")
    assert isinstance(base.model, transformers.LlamaForCausalLM)
    ids = base.tokenizer("def add(self, other):\n    return self.value + other.value\n")[
        "input_ids"
    ]
    batch = torch.tensor([ids])
    with torch.no_grad():
        loss = float(base.model(batch, labels=batch).loss)
    assert loss < 0.6 * math.log(len(base.tokenizer))  # of a guess at random
