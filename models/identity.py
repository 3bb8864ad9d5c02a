"""What a base model is, as one short word: sites train together only where it is the same.

    leaf       SHA-256 of up to 16 MiB of a tensor's bytes
    tensor     SHA-256 of its leaves
    identity   SHA-256 of format, class, configuration, labels, (name, dtype, shape, tensor) of each
               weight in the order of names, the tokenizer, and the code that a model brings along;
               its first 32 hexadecimal digits

It is computed from what was loaded, not from files: the same weights in one file or in ten, in
safetensors or not, are the same base. Leaves make the hash of one large tensor run on all cores.

Computed once, it is kept beside the model in `.bouquet-identity.json`, or where that folder takes
no file, below `~/.cache/bouquet`; and computed anew where any file of the folder changed.
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "bouquet-base-4"
DIGITS = 32
LEAF_BYTES = 16 << 20
CACHE_FILE = ".bouquet-identity.json"
NOT_OF_THE_BASE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "pad_token_id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a configuration that change no hidden state of the base."""
REMOTE_CODE = "transformers_modules."
"""What the modules of code from beside a checkpoint are called."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""Those that decide under which names a checkpoint is loaded, and what a tokenizer's parts are."""


def base_identity(
    model: nn.Module,
    tokenizer: Any,
    folder: Path | None,
    head: Collection[str] = (),
    labels: Sequence[str] = (),
) -> str:
    """The identity of a loaded base model with its tokenizer.

    Any other value of any weight is another identity, and so is any other step of the tokenizer.
    It does not depend on the device, nor on how the checkpoint was stored. It does depend on the
    dtype that the weights were loaded in (`model.dtype`): float32 rounded to bfloat16 is another
    base, though a bfloat16 checkpoint loaded in float32 is the same as its copy in float32. So it
    does on what no tensor shows, such as `rope_theta` in config.json.

    folder: where the model's files lie; None: nothing is kept.
    head: parameters that train and are no part of the base.
    labels: of a classifier, in order; they are part of it.
    """
    if folder is None:
        return compute_identity(model, tokenizer, head, labels)
    dtypes = sorted({str(tensor.dtype) for tensor in model.state_dict().values()})
    libraries = [*LIBRARIES, *(["bitsandbytes"] if getattr(model, "is_quantized", False) else [])]
    key = _digest(
        [FORMAT, type(model).__name__, dtypes, sorted(head), list(labels)]
        + [f"{name} {version(name)}" for name in libraries]
    )
    files = _digest(_file_states(folder))
    kept = _read_kept(folder, files)
    if key not in kept:
        kept = {**kept, key: compute_identity(model, tokenizer, head, labels)}
        _keep(folder, files, kept)
    return kept[key]


def compute_identity(
    model: nn.Module,
    tokenizer: Any,
    head: Collection[str] = (),
    labels: Sequence[str] = (),
) -> str:
    """The same, from the values themselves: about a second for each GB on two cores."""
    weights = {name: t for name, t in sorted(model.state_dict().items()) if name not in head}
    # Tied weights are one tensor under two names.
    places = {name: (t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in weights.items()}
    first = {place: name for name, place in reversed(places.items())}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        leaves = {
            place: [pool.submit(_hash, leaf) for leaf in _leaves(weights[name])]
            for place, name in first.items()
        }
        hashes = {
            place: hashlib.sha256(b"".join(leaf.result() for leaf in parts)).hexdigest()
            for place, parts in leaves.items()
        }
    tensors = [
        [name, str(t.dtype), list(t.shape), hashes[places[name]]] for name, t in weights.items()
    ]
    kind = [FORMAT, type(model).__name__, configuration(model), list(labels)]
    code = {"code": found} if (found := _code_of(model, tokenizer)) else {}
    return _digest([*kind, tensors, tokenizer_parts(tokenizer) | code])[:DIGITS]


def _code_of(model: nn.Module, tokenizer: Any) -> list[str]:
    """The source of every class that transformers loaded from beside the weights."""
    modules = {type(part).__module__ for part in (tokenizer, *model.modules())}
    own = [sys.modules[name] for name in modules if name.startswith(REMOTE_CODE)]
    return sorted(inspect.getsource(module) for module in own)


def configuration(model: nn.Module) -> dict[str, Any]:
    """What config.json says of the computation and differs from the defaults of its class.

    Not where it came from, who wrote it, labels, or what is set from call to call.
    """
    config: Any = getattr(model, "config", None)
    found = config.to_diff_dict() if config is not None else {}
    return {name: str(_of_the_base(found[name])) for name in sorted(found) if _counts(name)}


def _counts(name: object) -> bool:
    return name not in NOT_OF_THE_BASE


def _of_the_base(value: Any) -> Any:
    """The same of a configuration within the configuration, such as that of a text model."""
    if not isinstance(value, dict):
        return value
    return {name: _of_the_base(value[name]) for name in sorted(value, key=str) if _counts(name)}


def _leaves(tensor: torch.Tensor) -> list[memoryview]:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    data = memoryview(values)
    return [data[at : at + LEAF_BYTES] for at in range(0, len(data), LEAF_BYTES)]


def _hash(leaf: memoryview) -> bytes:
    return hashlib.sha256(leaf).digest()


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """All that decides which ids a text becomes: vocabulary, merges, every step, special tokens.

    Not what is set from call to call (padding, truncation), so that using a tokenizer does not
    change it, nor where it was loaded from.
    """
    named = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        pipeline |= {"padding": None, "truncation": None}
    else:
        added = {str(token): i for token, i in tokenizer.get_added_vocab().items()}
        pipeline = {
            "class": type(tokenizer).__name__,
            "vocabulary": dict(tokenizer.get_vocab()),
            "added": added,
        }
    return {
        "pipeline": pipeline,
        "special": named,
        "chat_template": getattr(tokenizer, "chat_template", None),
    }


def _digest(parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_states(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, nanoseconds of the last change) of every file but hidden ones."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    states = [(path.name, path.stat()) for path in sorted(files)]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _cache_places(folder: Path) -> list[Path]:
    """Beside the model, and where that takes no file, below the user's cache."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    elsewhere = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:DIGITS]
    return [folder / CACHE_FILE, caches / "bouquet" / f"identity-{elsewhere}.json"]


def _read_kept(folder: Path, files: str) -> dict[str, str]:
    """Key -> identity, as long as no file of the folder changed."""
    for place in _cache_places(folder):
        with suppress(OSError, ValueError):
            kept = json.loads(place.read_text())
            if isinstance(kept, dict) and kept.get("files") == files:
                found = kept.get("identities")
                if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
                    return found
    return {}


def _keep(folder: Path, files: str, identities: Mapping[str, str]) -> None:
    """Write them to the first place that takes a file; where none does, they are not kept."""
    text = json.dumps({"files": files, "identities": dict(identities)}, indent=1) + "\n"
    for place in _cache_places(folder):
        scratch = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(text)
            scratch.replace(place)
            return
        except OSError:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
