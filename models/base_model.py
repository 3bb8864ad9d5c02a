"""The common base model: found, checked and loaded once for each process.

Any causal language model that transformers can load, from a folder or a hub id; `embedded` is the
small one that this project ships and pretrained itself (tasks/stdlib_lm/README.md). Of a checkpoint
that also sees or hears, its text model is tuned. With labels the base is any encoder or decoder
that transformers knows a sequence classifier for; what lies between it and the logits is then the
head, which trains, and no part of the base's identity.

Weights come from safetensors. Where a checkpoint has only pytorch_model.bin, torch reads it with
weights_only, which builds tensors and runs no code.
"""

import importlib.metadata
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
import transformers

from core.errors import BouquetError, UsageError, listing
from models.identity import base_identity
from models.model_files import Place, find_model, first_line
from models.quantization import (
    NONE,
    quantization_config,
    refuse_without_library,
    settle,
    unpacked_modules,
)
from models.targets import expert_parameters
from settings.run import EMBEDDED

EMBEDDED_FOLDER = Path("tasks", "stdlib_lm")


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded model with its tokenizer, and what identifies it."""

    model: Any
    tokenizer: Any
    path: str
    identity: str
    """Hash of class, weights, tokenizer and labels, without the head: models/identity.py."""
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
    yield Path(str(installed.locate_file("bouquet/app")))
    if origin := installed.read_text("direct_url.json"):  # an editable install: its source folder
        yield Path(unquote(urlparse(json.loads(origin)["url"]).path))


def load_base_model(
    path: str,
    dtype: str,
    device: str,
    labels: Sequence[str] = (),
    trust_remote_code: bool = False,
    quantization: str = NONE,
) -> BaseModel:
    """Load model and tokenizer, frozen and in evaluation mode; with labels, a classifier of them.

    trust_remote_code: run the Python code that the model brings along.
    quantization: of the linear layers (models/quantization.py).

    Raises UsageError where there is no such model, or it is not a causal language model; with
    labels, where transformers knows no sequence classifier of its kind. So it does for a device
    that is not there, and for a tokenizer with ids that the model's embedding lacks.
    """
    where = choose_device(device)
    place = Place(str(embedded_model_path())) if path == EMBEDDED else find_model(path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer, report = _load(
        place, path, dtype, where, labels, trust_remote_code, quantization
    )
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    lacking = {*report["missing_keys"], *misshapen}
    head = _find_head(model, lacking, path) if labels else ()
    if odd := sorted(misshapen - set(head)):
        raise UsageError(f"{path}: config.json and weights differ in the shape of {listing(odd)}")
    if absent := sorted(lacking - set(head)):  # transformers would draw them at random
        raise UsageError(f"{path} is not whole: its weights lack {listing(absent)}")
    _check_vocabulary(model, tokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    text = model.config.get_text_config()
    if labels:
        tokenizer.truncation_side = "right"
        # A decoder's logits are those of the last token that is not this one.
        text.pad_token_id = tokenizer.pad_token_id or 0
    model.requires_grad_(False)
    model.eval()
    _fit_experts(model)
    settle(model)
    model.config.use_cache = text.use_cache = False
    identity = base_identity(model, tokenizer, _folder_of(place.name), head, labels)
    return BaseModel(
        model.to(where),
        tokenizer,
        path=place.name,
        identity=identity,
        context=usable_positions(model),
        head=head,
        new=frozenset(head) & lacking,
    )


def _load(
    place: Place,
    path: str,
    dtype: str,
    device: torch.device,
    labels: Sequence[str],
    trust_remote_code: bool,
    quantization: str,
) -> tuple[Any, Any, Any]:
    """Model, tokenizer, and what transformers says of the weights."""
    options = {"trust_remote_code": trust_remote_code, "local_files_only": place.local_only}
    auto = transformers.AutoModelForSequenceClassification
    what = "model"
    try:
        what = "configuration"
        config = transformers.AutoConfig.from_pretrained(place.name, **options, **_classes(labels))
        (_check_classifier if labels else _check_causal)(config, path)
        packed = _packed(config, quantization, getattr(torch, dtype), device, path, labels)
        what = "tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.name, **options)
        what = "weights"
        model, report = (auto if labels else transformers.AutoModelForCausalLM).from_pretrained(
            place.name,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),  # a head of other labels
            weights_only=True,
            **options,
            **packed,
        )
    except BouquetError:
        raise
    except Exception as error:  # whatever a stranger's checkpoint makes transformers raise
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UsageError(
                f"{path} brings its own Python code, which could do anything on this machine: read "
                "it, then set model.trust-remote-code=true (a site: also trust-remote-code = true "
                "in its site.toml)"
            ) from error
        raise UsageError(
            f"no {'classifier' if labels else 'causal language model'} can be loaded from "
            f"{path!r}: its {what} cannot be read: {first_line(error)} (expected a folder with "
            "config.json, weights and tokenizer, or a hub id)"
        ) from error
    return model, tokenizer, report


def usable_positions(model: Any) -> int:
    """The longest sequence that the model takes, in tokens.

    A table of positions with a padding index counts from behind it: RoBERTa's 514 rows, padding at
    1, take 512 tokens.
    """
    most = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    longest = most if most > 0 else 1 << 30
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and "position" in name.rpartition(".")[2]:
            longest = min(longest, int(module.weight.shape[0]) - padding - 1)
    return longest


def _fit_experts(model: Any) -> None:
    """Experts of odd sizes are multiplied one by one: torch's grouped product takes whole 16 bytes.

    That is the fast way, which transformers takes by itself.
    """
    for name, _ in expert_parameters(model):
        parameter = model.get_parameter(name)
        if any(size * parameter.element_size() % 16 for size in parameter.shape[1:]):
            model.set_experts_implementation("eager")
            return


def _check_vocabulary(model: Any, tokenizer: Any, path: str) -> None:
    """An id beyond the embedding would be read from nowhere."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    if beyond := sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows):
        raise UsageError(
            f"{path}: the tokenizer knows {len(beyond)} tokens more than the model's embedding, "
            f"which has {rows:,} rows: {listing(token for _, token in beyond)}. Take the tokenizer "
            "that belongs to these weights, or save the model again after "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def _packed(
    config: Any,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    path: str,
    labels: Sequence[str],
) -> dict[str, Any]:
    """What `from_pretrained` is told where weights are held in 8 or 4 bits; they stay put then."""
    if getattr(config, "quantization_config", None) is not None:
        refuse_without_library(f"{path}, whose weights are quantized already,")
        return {"device_map": {"": device}}
    if quantization == NONE:
        return {}
    wanted = quantization_config(quantization, dtype, unpacked_modules(config) if labels else None)
    return {"quantization_config": wanted, "device_map": {"": device}}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one and the CPU elsewhere; any other name is torch's own.

    Raises UsageError for a device that torch does not know or does not find on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        sees = f"{found} CUDA devices here, cuda:0 to cuda:{found - 1}" if found else "no CUDA here"
        raise UsageError(f"device {name} was asked for, but torch sees {sees}: take cpu or auto")
    try:
        there = device.type != "meta" and torch.zeros(1, device=device).item() == 0.0
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        there = False
    if not there:
        raise UsageError(
            f"device {name} was asked for, but torch finds none on this machine: take cpu or auto"
        )
    return device


def _check_causal(config: Any, path: str) -> None:
    """A causal language model, or a checkpoint of several senses whose text model is one."""
    named = list(getattr(config, "architectures", None) or [])
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    several = config.get_text_config() is not config and not config.is_encoder_decoder
    causal = not named or any("CausalLM" in name or "LMHeadModel" in name for name in named)
    if not (own_code or (known and (causal or several))):
        raise UsageError(
            f"{path} is not a causal language model: its config names "
            f"{listing(named) or 'nothing'} (model_type {config.model_type}). Expected a "
            "...ForCausalLM, or a model whose text part transformers loads as one."
        )


def _check_classifier(config: Any, path: str) -> None:
    auto = transformers.models.auto.modeling_auto
    own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    known = own_code or type(config) in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if not known or config.is_encoder_decoder:
        lacks = "Bouquet tunes no encoder-decoder" if known else "transformers has no such model"
        raise UsageError(
            f"no sequence classifier can be made of {path} (model_type {config.model_type}): "
            f"{lacks}. Take an encoder such as BERT or a decoder such as Llama, or task=causal"
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
