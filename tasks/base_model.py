"""The common base model: found, checked and loaded once for each process.

Any causal language model that transformers can load, from a folder or a hub id; `embedded` is the
small one that this project ships and pretrained itself (tasks/stdlib_lm/README.md). With labels it
is any encoder or decoder that transformers knows a sequence classifier for; what lies between its
base and the logits is then the head, which trains, and no part of the base's identity.
"""

import difflib
import importlib.metadata
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.errors import UsageError, listing
from settings.run import EMBEDDED
from tasks.identity import base_identity

EMBEDDED_FOLDER = Path("tasks", "stdlib_lm")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded model with its tokenizer, and what identifies it."""

    model: Any
    tokenizer: Any
    path: str
    identity: str
    """Hash of class, weights, tokenizer and labels, without the head: tasks/identity.py."""
    context: int
    """The longest sequence that the model takes."""
    head: tuple[str, ...] = ()
    """Names of the parameters of a classifier's head, sorted."""
    new: frozenset[str] = frozenset()
    """Those of the head that the checkpoint does not hold."""


def embedded_model_path() -> Path:
    """Where the embedded base lies.

    A Flower app bundle carries code but no weights, so beside the bundle's code there is none: then
    it is that of the installed project.
    """
    for root in _project_roots():
        if (root / EMBEDDED_FOLDER / "model.safetensors").is_file():
            return root / EMBEDDED_FOLDER
    raise UsageError(
        "the embedded base model is not beside the code and bouquet is not installed here: install "
        "the project (pip install .), or name a model with model.path or the site's model-path"
    )


def _project_roots() -> Iterator[Path]:
    yield Path(__file__).resolve().parent.parent
    try:
        installed = importlib.metadata.distribution("bouquet")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(installed.locate_file("")))
    if origin := installed.read_text("direct_url.json"):  # an editable install: its source folder
        yield Path(unquote(urlparse(json.loads(origin)["url"]).path))


def load_base_model(path: str, dtype: str, device: str, labels: Sequence[str] = ()) -> BaseModel:
    """Load model and tokenizer, frozen and in evaluation mode; with labels, a classifier of them.

    Raises UsageError where there is no such model, or it is not a causal language model; with
    labels, where transformers knows no sequence classifier of its kind.
    """
    place = str(embedded_model_path()) if path == EMBEDDED else str(Path(path).expanduser())
    if not Path(place).is_dir():
        place = path  # a hub id
        if path.startswith((".", "/", "~")):
            raise UsageError(f"model.path names {path!r}, where there is no folder")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(place, **_classes(labels))
        (_check_classifier if labels else _check_causal)(config, path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        auto = transformers.AutoModelForSequenceClassification
        model, report = (auto if labels else transformers.AutoModelForCausalLM).from_pretrained(
            place,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),  # a head of other labels
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"no {'classifier' if labels else 'causal language model'} can be loaded from "
            f"{path!r}: {first} (expected a folder with config.json, weights and tokenizer, or a "
            "hub id)"
        ) from error
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    lacking = {*report["missing_keys"], *misshapen}
    head = _find_head(model, lacking, path) if labels else ()
    if odd := sorted(misshapen - set(head)):
        raise UsageError(f"{path}: config.json and weights differ in the shape of {listing(odd)}")
    if absent := sorted(lacking - set(head)):  # transformers would draw them at random
        raise UsageError(f"{path} is not whole: its weights lack {listing(absent)}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = int(getattr(config, "max_position_embeddings", 1 << 30) or 1 << 30)
    if labels:
        tokenizer.truncation_side = "right"
        longest = min(longest, int(tokenizer.model_max_length))  # RoBERTa has positions to spare
        # A decoder's logits are those of the last token that is not this one.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id or 0
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    identity = base_identity(model, tokenizer, _folder_of(place), head, labels)
    return BaseModel(
        model.to(choose_device(device)),
        tokenizer,
        path=place,
        identity=identity,
        context=longest,
        head=head,
        new=frozenset(head) & lacking,
    )


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one and the CPU elsewhere; any other name is torch's own."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} was asked for, but torch sees no CUDA here: take cpu")
    return device


def _check_causal(config: Any, path: str) -> None:
    named = list(getattr(config, "architectures", None) or [])
    known = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = not named or any("CausalLM" in name or "LMHeadModel" in name for name in named)
    if not known or not causal:
        raise UsageError(
            f"{path} is not a causal language model: its config names "
            f"{listing(named) or 'nothing'} (model_type {config.model_type}). Expected a "
            "...ForCausalLM."
        )


def _check_classifier(config: Any, path: str) -> None:
    auto = transformers.models.auto.modeling_auto
    if type(config) not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UsageError(
            f"transformers has no sequence classifier for {path} (model_type {config.model_type}): "
            "take an encoder such as BERT or a decoder such as Llama, or task=causal"
        )


def _classes(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of the labels."""
    if not labels:
        return {}
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _find_head(model: Any, lacking: Collection[str], path: str) -> tuple[str, ...]:
    """The parameters beside the classifier's base, and the base's pooler where it must be new."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    head = {name for name, parameter in model.named_parameters() if id(parameter) not in base}
    if not head:
        raise UsageError(f"{path} as {type(model).__name__} has no head beside its base to train")
    poolers = {
        name[: name.index(".pooler.") + len(".pooler.")] for name in lacking if ".pooler." in name
    }
    for pooler in poolers:
        head |= {name for name, _ in model.named_parameters() if name.startswith(pooler)}
    return tuple(sorted(head))


def _folder_of(place: str) -> Path | None:
    """Where the files of a model lie; of a hub id, in the hub's cache."""
    if Path(place).is_dir():
        return Path(place)
    found = transformers.utils.cached_file(
        place, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return Path(found).parent if found else None


def find_target_modules(model: Any, targets: str, head: Collection[str] = ()) -> list[str]:
    """Full names of the linear layers that `lora.target-modules` asks for, sorted.

    targets: `all-linear` (every linear layer but the output head), or names with commas; a name
    stands for every layer that it is the last part of.
    head: parameters that train whole, so that their layers are no targets.

    Raises UsageError for a name that matches no linear layer, with the nearest ones.
    """
    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and f"{name}.weight" not in head
    ]
    if targets.strip() == "all-linear":
        return sorted(linear)
    found: set[str] = set()
    for target in (part.strip() for part in targets.split(",")):
        matches = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matches or not target:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            near = difflib.get_close_matches(target, kinds, n=3, cutoff=0.3) or kinds
            raise UsageError(
                f"lora.target-modules: {target!r} matches no linear layer of this model; the "
                f"nearest are {listing(near)}. All of them: all-linear."
            )
        found |= matches
    return sorted(found)
