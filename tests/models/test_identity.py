"""Two bases are the same where every weight and every step of the tokenizer is; and only there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from models import identity
from models.base_model import load_base_model
from models.identity import CACHE_FILE, base_identity, compute_identity
from tools.rehearsal.tiny_models import save_llama, tiny_tokenizer

LEAF = 256
"""As small as this, the tests' tensors are hashed in several leaves."""


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A tiny Llama of its own, with nothing kept beside it."""
    copy = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (copy / CACHE_FILE).unlink(missing_ok=True)
    return copy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bouquet"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The identities that were computed, and not only read."""
    found: list[str] = []

    def noted(*arguments: Any) -> str:
        found.append(compute_identity(*arguments))
        return found[-1]

    monkeypatch.setattr(identity, "compute_identity", noted)
    return found


def load(folder: Path, dtype: str = "float32", labels: tuple[str, ...] = ()) -> Any:
    return load_base_model(str(folder), dtype, "cpu", labels)


def open_parts(folder: Path) -> tuple[Any, Any]:
    base = load(folder)
    return base.model, base.tokenizer


def test_one_flipped_bit_anywhere_is_another_identity(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "LEAF_BYTES", LEAF)
    model, tokenizer = open_parts(folder)
    seen = {compute_identity(model, tokenizer)}
    flips = 0
    for tensor in model.state_dict().values():
        bits = tensor.view(torch.int32).view(-1)
        for place in {0, 1, len(bits) // 2, LEAF // 4 - 1, LEAF // 4, len(bits) - 2, len(bits) - 1}:
            if place < len(bits):
                bits[place] ^= 1  # the last bit of the mantissa
                seen.add(compute_identity(model, tokenizer))
                bits[place] ^= 1
                flips += 1
    assert flips > 100
    assert len(seen) == flips + 1
    assert compute_identity(model, tokenizer) in seen


def test_values_that_change_places_are_another_identity(folder: Path) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    rows = compute_identity(model, tokenizer)
    weight[[0, 1]] = weight[[1, 0]]
    up, gate = (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj)
    up.weight, gate.weight = gate.weight, up.weight
    modules = compute_identity(model, tokenizer)
    assert len({before, rows, modules}) == 3


def test_class_labels_and_head_count_as_they_should(folder: Path) -> None:
    model, tokenizer = open_parts(folder)
    plain = compute_identity(model, tokenizer)
    head = ["lm_head.weight"]
    without = compute_identity(model, tokenizer, head)
    model.lm_head.weight.data.add_(1.0)
    assert compute_identity(model, tokenizer, head) == without
    assert compute_identity(model, tokenizer) != plain
    assert compute_identity(model, tokenizer, head, ["a", "b"]) != without
    labelled = [compute_identity(model, tokenizer, head, names) for names in ("ab", "ba")]
    assert labelled[0] != labelled[1]

    class Other(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Other
    assert compute_identity(model, tokenizer, head) != without


def test_how_the_checkpoint_is_stored_does_not_matter(folder: Path, tmp_path: Path) -> None:
    base = load(folder)
    base.model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    base.tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert load(tmp_path / "parts").identity == base.identity


def test_it_depends_on_the_format_that_weights_are_loaded_in(tmp_path: Path) -> None:
    half = save_llama(tmp_path / "half", dtype="bfloat16")
    weights = {n: t.float() for n, t in load_file(half / "model.safetensors").items()}
    same = Path(shutil.copytree(half, tmp_path / "same"))
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    assert load(half, "float32").identity == load(same, "float32").identity
    assert load(half, "bfloat16").identity == load(same, "bfloat16").identity
    assert load(half, "float32").identity != load(half, "bfloat16").identity


def test_it_does_not_depend_on_the_device_or_the_memory_layout(folder: Path) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert compute_identity(model, tokenizer) == before
    if torch.cuda.is_available():
        assert compute_identity(model.to("cuda"), tokenizer) == before


def test_a_tensor_of_no_dimension_and_one_of_no_values_count(folder: Path) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    model.register_buffer("temperature", torch.tensor(1.0))
    one = compute_identity(model, tokenizer)
    model.temperature.fill_(2.0)
    two = compute_identity(model, tokenizer)
    model.register_buffer("nothing", torch.zeros(0, 3))
    assert len({before, one, two, compute_identity(model, tokenizer)}) == 4


def test_tied_weights_are_those_of_an_untied_copy(tmp_path: Path) -> None:
    tied = load(save_llama(tmp_path / "tied", tie_word_embeddings=True))
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight
    before = compute_identity(tied.model, tied.tokenizer)
    tied.model.lm_head.weight = torch.nn.Parameter(tied.model.lm_head.weight.detach().clone())
    assert compute_identity(tied.model, tied.tokenizer) == before
    tied.model.lm_head.weight.data[0, 0] += 1.0
    assert compute_identity(tied.model, tied.tokenizer) != before


def lower_cased(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def split_at_spaces(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def put_nothing_around(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")


def add_a_word(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("federated")])


def end_otherwise(tokenizer: Any) -> None:
    tokenizer.eos_token = "<s>"


def chat_otherwise(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages }}"


CHANGES: list[Callable[[Any], None]] = [
    lower_cased,
    split_at_spaces,
    put_nothing_around,
    add_a_word,
    end_otherwise,
    chat_otherwise,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tokenizer_is_another_identity(
    change: Callable[[Any], None], folder: Path
) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    change(tokenizer)
    assert compute_identity(model, tokenizer) != before


def test_one_merge_or_one_entry_of_the_vocabulary_is_another_identity(folder: Path) -> None:
    before = load(folder).identity
    file = folder / "tokenizer.json"
    text = file.read_text()
    pieces = json.loads(text)
    merges = pieces["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]
    file.write_text(json.dumps(pieces))
    assert load(folder).identity != before
    pieces = json.loads(text)
    vocabulary = pieces["model"]["vocab"]
    low, high = sorted(vocabulary, key=vocabulary.__getitem__)[10:12]
    vocabulary[low], vocabulary[high] = vocabulary[high], vocabulary[low]
    file.write_text(json.dumps(pieces))
    assert load(folder).identity != before
    file.write_text(text)
    assert load(folder).identity == before


def test_using_saving_and_loading_a_tokenizer_does_not_change_it(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    tokenizer(["a", "b c d e f g"], padding=True, truncation=True, max_length=4)
    tokenizer.padding_side = "left"
    assert tokenizer.backend_tokenizer.truncation is not None
    assert compute_identity(model, tokenizer) == before
    for generation in range(2):
        tokenizer.save_pretrained(tmp_path / f"again-{generation}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"again-{generation}")
        assert compute_identity(model, tokenizer) == before


class PlainTokenizer:
    """A tokenizer without a backend, as transformers' own in Python are."""

    def __init__(self, words: dict[str, int]) -> None:
        self.special_tokens_map = {"eos_token": "</s>"}
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return self._words

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def test_a_tokenizer_without_a_backend_is_known_by_its_vocabulary(folder: Path) -> None:
    model, _ = open_parts(folder)
    one, same, other = ({"a": 0, "b": 1}, {"b": 1, "a": 0}, {"a": 1, "b": 0})
    words = [
        compute_identity(model, PlainTokenizer(vocabulary)) for vocabulary in (one, same, other)
    ]
    assert words[0] == words[1] != words[2]


def test_another_process_finds_the_same(folder: Path) -> None:
    code = (
        "import sys; from models.base_model import load_base_model as load; "
        "from models.identity import compute_identity as compute; "
        "base = load(sys.argv[1], 'float32', 'cpu'); print(compute(base.model, base.tokenizer))"
    )
    root = Path(__file__).resolve().parents[2]
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {load(folder).identity}


def test_it_is_computed_once_and_again_when_a_file_changes(
    folder: Path, computed: list[str]
) -> None:
    first = load(folder).identity
    assert load(folder).identity == first
    assert computed == [first]
    assert (folder / CACHE_FILE).is_file()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    second = load(folder).identity
    assert second != first
    assert computed == [first, second]
    assert load(folder).identity == second
    assert len(computed) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_was_only_touched_is_read_again(
    name: str, folder: Path, computed: list[str]
) -> None:
    first = load(folder).identity
    os.utime(folder / name, ns=(0, 0))
    assert load(folder).identity == first
    assert computed == [first, first]


def test_number_formats_and_labels_are_kept_beside_each_other(
    folder: Path, computed: list[str]
) -> None:
    wanted = [
        load(folder).identity,
        load(folder, "bfloat16").identity,
        load(folder, labels=("a", "b")).identity,
        load(folder, labels=("b", "a")).identity,
    ]
    assert computed == wanted
    assert len(set(wanted)) == 4
    again = [
        load(folder, labels=("b", "a")).identity,
        load(folder, labels=("a", "b")).identity,
        load(folder, "bfloat16").identity,
        load(folder).identity,
    ]
    assert again == wanted[::-1]
    assert computed == wanted


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": 1}', "\0", '{"identities": {"a": 1}}'])
def test_a_damaged_cache_is_passed_over(text: str, folder: Path, computed: list[str]) -> None:
    first = load(folder).identity
    (folder / CACHE_FILE).write_text(text)
    assert load(folder).identity == first
    assert computed == [first, first]
    assert load(folder).identity == first
    assert len(computed) == 2


def test_where_the_folder_takes_no_file_it_is_kept_in_the_users_cache(
    folder: Path, home: Path, computed: list[str]
) -> None:
    (folder / CACHE_FILE).mkdir()  # even root cannot write a file there
    first = load(folder).identity
    assert load(folder).identity == first
    assert computed == [first]
    (kept,) = home.iterdir()
    assert first in kept.read_text()
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    assert load(other).identity == first
    assert len(list(home.iterdir())) == 2


def test_where_nothing_takes_a_file_it_is_computed_each_time(
    folder: Path, home: Path, computed: list[str]
) -> None:
    (folder / CACHE_FILE).mkdir()
    home.parent.write_text("a file where the cache would be")
    first = load(folder).identity
    assert load(folder).identity == first
    assert computed == [first, first]
    assert sorted(path.name for path in folder.iterdir() if path.name[0] == ".") == [CACHE_FILE]


def test_without_a_folder_nothing_is_kept(folder: Path, computed: list[str]) -> None:
    model, tokenizer = open_parts(folder)
    computed.clear()
    first = base_identity(model, tokenizer, None)
    assert base_identity(model, tokenizer, None) == first
    assert computed == [first, first]


def test_the_tokenizer_counts_in_the_identity_of_a_folder(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tiny_tokenizer(adds="both").save_pretrained(other)
    assert load(other).identity != load(folder).identity


def test_what_no_tensor_shows_is_in_it_and_what_changes_nothing_is_not(folder: Path) -> None:
    model, tokenizer = open_parts(folder)
    before = compute_identity(model, tokenizer)
    model.config.use_cache = not model.config.use_cache
    model.config._name_or_path = "elsewhere"
    assert compute_identity(model, tokenizer) == before
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500.0}
    assert compute_identity(model, tokenizer) != before
