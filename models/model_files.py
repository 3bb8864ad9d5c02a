"""Where a base model lies, decided before anything of it is loaded.

A name that is no folder is a hub id only if it can be one; then the hub is asked once, shortly. A
mistyped folder is known at once, and so are folders that hold something else than a base model.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from core.errors import UsageError, listing, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
HUB_SECONDS = 5.0
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Place:
    """Where a model is loaded from."""

    name: str
    """A folder, which may be one of the hub's cache, or a hub id."""
    local_only: bool = True
    """The hub is not asked for anything more."""


def find_model(path: str) -> Place:
    """The folder or the hub id that `model.path` names.

    Raises UsageError where there is neither, where the hub does not answer and its cache has no
    such model, and for a folder with an adapter in it or without config.json.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder, path)
        return Place(str(folder))
    if folder.exists():
        raise UsageError(
            f"model.path names the file {path}: expected the folder of a model, with config.json, "
            "safetensors weights and tokenizer"
        )
    if not HUB_ID.fullmatch(path) or ".." in path or "--" in path:
        hint = _nearest(folder) if folder.parent.is_dir() else f", nor is there {folder.parent}"
        raise UsageError(f"model.path names {path!r}, where there is no folder{hint}")
    if "/" in path and folder.parent.is_dir() and _cached(path) is None:
        raise UsageError(
            f"model.path names {path!r}, where there is no folder{_nearest(folder)}. If it is a "
            f"hub id, fetch it first: hf download {path}"
        )
    return _on_the_hub(path, folder)


def _check_folder(folder: Path, path: str) -> None:
    """What a folder holds in place of a base model, or beside it."""
    is_model, is_adapter = ((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    if is_adapter and not is_model:
        raise _is_an_adapter(path, folder / ADAPTER_CONFIG)
    if is_adapter:
        raise _has_an_adapter_beside(path)
    if is_model:
        return
    if found := sorted(folder.glob("*.gguf")):
        raise UsageError(
            f"{path} holds {found[0].name}, but no config.json: Bouquet trains on safetensors. "
            "Convert it once: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="
            f"{found[0].name!r}).save_pretrained(OTHER), and the same with AutoTokenizer"
        )
    names = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
    holds = listing(names) or "nothing"
    below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
    hint = f"; a model lies in {folder / below[0]}" if below else ""
    raise UsageError(
        f"{path} holds no model: expected config.json, safetensors weights and tokenizer; it holds "
        f"{holds}{hint}"
    )


def _is_an_adapter(path: str, config: Path) -> UsageError:
    base = _read_json(config).get("base_model_name_or_path") or "BASE"
    of = "an adapter" if base == "BASE" else f"an adapter of {base}"
    return UsageError(f"{path} is {of}, no base model: use --model {base} --start-from {path}")


def _has_an_adapter_beside(path: str) -> UsageError:
    return UsageError(
        f"{path} holds a base model and, in adapter_config.json, an adapter, which transformers "
        "would load into it: move its files to a folder of their own and begin from it with "
        "--start-from FOLDER, or leave them there"
    )


def _refuse_adapter_beside(name: str) -> None:
    """UsageError where a repository of the hub holds an adapter beside its model."""
    try:
        _ask_hub(name, ADAPTER_CONFIG)
    except EntryNotFoundError:
        return
    raise _has_an_adapter_beside(name)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _nearest(folder: Path) -> str:
    """The folder beside it whose name is most like this one's, as a hint."""
    with suppress(OSError):
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        for near in nearest(folder.name, names, cutoff=0.5):
            return f"; the nearest is {folder.parent / near}"
    return ""


def _cached(name: str) -> Path | None:
    """The folder of a hub's model in the cache on this machine."""
    config = huggingface_hub.try_to_load_from_cache(name, CONFIG)
    return Path(config).parent if isinstance(config, str) else None


def _on_the_hub(name: str, folder: Path) -> Place:
    cached, reason = _cached(name), "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            _ask_hub(name, CONFIG)
            _refuse_adapter_beside(name)
            return Place(name, local_only=False)
        except UsageError:
            raise
        except EntryNotFoundError:
            raise _without_config(name) from None
        except GatedRepoError:
            reason = "the hub gives it to those only who accepted its terms: hf auth login"
        except RepositoryNotFoundError:
            reason = "the hub has none of that name, or not for you: hf auth login"
        except Exception as error:  # of any HTTP library
            reason = f"the hub does not answer ({first_line(error)})"
    if cached is not None:
        _check_folder(cached, name)
        return Place(str(cached))
    raise UsageError(
        f"no model {name!r}: there is no such folder{_nearest(folder)}, and as a hub id it is "
        f"not in the hub's cache on this machine; {reason}"
    )


def _ask_hub(name: str, file: str) -> None:
    url = huggingface_hub.hf_hub_url(name, file)
    huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)


def _without_config(name: str) -> UsageError:
    """A repository of the hub that is no model: an adapter, or something else."""
    try:
        return _is_an_adapter(name, Path(huggingface_hub.hf_hub_download(name, ADAPTER_CONFIG)))
    except Exception:  # whatever the hub says: it is no adapter
        return UsageError(f"the hub's {name} holds no config.json: expected a model")


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
