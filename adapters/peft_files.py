"""An adapter as the two files that PEFT loads: adapter_config.json and adapter_model.safetensors.

PEFT multiplies B A by alpha / r. Here every module is written with alpha = r and its scale folded
into B, so that a module's rank may be any number, through PEFT's `rank_pattern` and
`alpha_pattern`. A classification head goes beside it whole, as PEFT's `modules_to_save`. The
matrices of experts are joined by parameter, as PEFT has them (adapters/expert_names.py).

Reading takes any adapter whose delta is s B A and nothing more.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from adapters.adapter import Adapter, Delta, Factors, FloatArray, Shapes
from adapters.expert_names import expert_parameters, joined, parted, peft_names, plain_and_experts
from adapters.head import Head, HeadShapes
from adapters.number_formats import decode
from adapters.refactoring import as_factors
from core.errors import AdapterError, UsageError, listing

PREFIX = "base_model.model."
CONFIG, WEIGHTS, LABELS = "adapter_config.json", "adapter_model.safetensors", "labels.json"
FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<letter>[AB])(\.default)?\.weight"
)
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that also change the base's weights, so that B A alone is not what was added."""
MORE_THAN_BA = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
)
"""Keys of adapter_config.json under which an adapter is more, or something else, than s B A."""


def write_peft(
    delta: Delta,
    folder: Path,
    base_model: str,
    head: Head | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write `delta` so that `PeftModel.from_pretrained(base, folder)` adds exactly this.

    base_model: what the config names as its base, a path or a hub id; PEFT only notes it.
    head: what trained beside it, which PEFT puts in place of the base's own values.
    labels: in the order of the classes; they go to labels.json, as transformers' configs name them.
    With a head or labels the base is a sequence classifier, of as many labels; without a head it
    keeps its own, and the configuration names no task.

    A module of rank 0 is written as rank 1 with zeros, because PEFT knows no rank 0; a dense one as
    factors of its full rank.
    """
    adapter = as_factors(delta)
    if not adapter:
        raise AdapterError("there is no module in this adapter: nothing to write")
    tensors: dict[str, FloatArray] = {}
    ranks: dict[str, int] = {}
    plain, experts = plain_and_experts(adapter)
    beginnings = peft_names(list(experts))
    # Of all experts alike: PEFT takes patterns for parameters, but warns that it takes none.
    common = max([1, *(f.rank for factors in experts.values() for f in factors)])
    for name, f in plain.items():
        ranks[name] = max(f.rank, 1)
    parts = [(name, [f], ranks[name]) for name, f in plain.items()]
    parts += [(beginnings[p], factors, common) for p, factors in experts.items()]
    for name, factors, rank in parts:
        a, b = joined(factors, rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    most = common if experts else max(ranks.values())
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(plain),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    if experts:
        config["target_parameters"] = sorted(parameter.full_name for parameter in experts)
    if labels:
        config["task_type"] = None  # under SEQ_CLS, PEFT loads no adapter without a head
    if head:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": modules_to_save(list(head))}
        for name, values in head.items():
            tensors[PREFIX + name] = np.asarray(values, np.float32, order="C")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if labels:
        classes = {
            "id2label": {str(index): label for index, label in enumerate(labels)},
            "label2id": {label: index for index, label in enumerate(labels)},
        }
        text = json.dumps(classes, indent=2, ensure_ascii=False) + "\n"
        (folder / LABELS).write_text(text, encoding="utf-8")


def modules_to_save(parameters: Sequence[str]) -> list[str]:
    """The modules that hold these parameters of a head: the outermost ones, or a base's pooler.

    >>> modules_to_save(["classifier.dense.weight", "score.weight", "bert.pooler.dense.bias"])
    ['classifier', 'pooler', 'score']
    """
    parts = [name.split(".") for name in parameters]
    return sorted({"pooler" if "pooler" in path[:-1] else path[0] for path in parts})


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """What a folder of PEFT's holds, over the modules of a run."""

    adapter: Adapter
    """Of rank 0 in the modules that the folder has no factors for."""
    head: dict[str, FloatArray] = field(default_factory=dict)
    base_model: str = ""
    """What its configuration names as its base; empty where it names none."""
    modules: int = 0
    """How many modules it has factors for."""


def read_peft(
    folder: Path, shapes: Shapes, head_shapes: HeadShapes | None = None, labels: Sequence[str] = ()
) -> PeftAdapter:
    """The adapter that PEFT or `write_peft` wrote, as factors over the modules of `shapes`.

    W + delta is exactly what `PeftModel.from_pretrained(base, folder)` computes with. Factors may
    be stored in float32, float16, bfloat16 or float64.

    head_shapes: what a run trains beside the factors; the folder's head then comes along.
    labels: of the run's classes, in order; where the folder names others it is refused.

    Raises UsageError for a folder that is no adapter, for one that is not just s B A (DoRA, biases,
    whole layers, an initialisation that changed the base), for pickled weights, and for modules
    that the run does not adapt or that have another shape there.
    """
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    found: dict[str, dict[str, FloatArray]] = {}
    beside = {}
    for key, values in tensors.items():
        if match := FACTOR.fullmatch(key):
            found.setdefault(match["module"], {})[match["letter"]] = values
        else:
            beside[key.removeprefix(PREFIX)] = values
    if odd := [name for name, halves in found.items() if set(halves) != {"A", "B"}]:
        raise UsageError(f"{folder} has only one of the two factors of {listing(odd)}")
    head = _head(folder, beside, head_shapes or {}, labels)
    modules = _experts(folder, config, found, shapes)
    for name, halves in found.items():
        if name not in shapes:
            continue
        modules[name] = Factors(halves["A"], halves["B"], _scale(config, name, len(halves["A"])))
    known = set(modules) | set(peft_names(list(expert_parameters(list(shapes)))).values())
    if foreign := sorted(set(found) - known):
        raise UsageError(
            f"{folder} adapts modules that this run does not: {listing(foreign)}. Name them with "
            "lora.target-modules, or take the base model that it belongs to"
            + (f": {config['base_model_name_or_path']}" * bool(config["base_model_name_or_path"]))
        )
    for name, factors in modules.items():
        if factors.shape != tuple(shapes[name]):
            raise UsageError(
                f"{folder}: the delta of {name} is {factors.shape[0]} x {factors.shape[1]}, the "
                f"base model's matrix {shapes[name][0]} x {shapes[name][1]}: it is an adapter of "
                "another base"
            )
    whole = {
        name: modules[name]
        if name in modules
        else Factors(np.zeros((0, n), np.float32), np.zeros((m, 0), np.float32), 1.0)
        for name, (m, n) in shapes.items()
    }
    base = str(config["base_model_name_or_path"] or "")
    return PeftAdapter(Adapter(whole), head, base, len(modules))


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults; UsageError where it is more than s B A."""
    path = folder / CONFIG
    if not path.is_file():
        base = (folder / "config.json").is_file()
        holds = "a base model" if base else "no adapter" if folder.is_dir() else "no folder"
        raise UsageError(
            f"start.adapter names {folder}, which is {holds}: expected a folder with {CONFIG} and "
            f"{WEIGHTS}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UsageError(f"{path}: a run begins from adapters of peft_type LORA; this is {kind!r}")
    more = [name for name in MORE_THAN_BA if config.get(name)]
    if config.get("bias", "none") != "none":
        more.append(f"bias={config['bias']}")
    if more:
        raise UsageError(
            f"{folder}: its delta is not B A alone ({', '.join(more)}), so no run can begin from "
            "it exactly"
        )
    begun = str(config.get("init_lora_weights", True)).lower()
    if begun.startswith(CHANGES_THE_BASE):
        raise UsageError(
            f"{folder} was begun with init_lora_weights={begun!r}, which changed the base as well: "
            "save it as a plain adapter first, PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    defaults: dict[str, Any] = {"r": 8, "lora_alpha": 8, "base_model_name_or_path": None}
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    given = {name: value for name, value in config.items() if value is not None}
    return {**defaults, **patterns, **given}


def _read_tensors(folder: Path) -> dict[str, FloatArray]:
    """Name -> values in float32, finite."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UsageError(
            f"{folder} has no {WEIGHTS}"
            + (
                ", only adapter_model.bin: a pickle can run code as it is read. Load it with PEFT "
                "where you trust it, and save_pretrained writes safetensors"
                if pickled
                else f"; it holds {listing(sorted(entry.name for entry in folder.iterdir()))}"
            )
        )
    try:
        entries: Any = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        tensors = {name: _in_float32(name, entry) for name, entry in sorted(entries, key=_name)}
    except (OSError, SafetensorError, AdapterError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if odd := [name for name, values in tensors.items() if not np.isfinite(values).all()]:
        raise UsageError(f"{path} holds values that are not finite, in {listing(odd)}")
    return tensors


def _name(entry: tuple[str, Any]) -> str:
    return entry[0]  # the library gives them in no order


def _in_float32(name: str, entry: Mapping[str, Any]) -> FloatArray:
    shape, code, data = tuple(entry["shape"]), entry["dtype"], bytes(entry["data"])
    if code == "F64":
        return np.frombuffer(data, "<f8").reshape(shape).astype(np.float32)
    if code not in ("F32", "F16", "BF16"):
        raise AdapterError(f"{name} is stored as {code}, which is no floating point number here")
    flat = decode(data, code, (1, int(np.prod(shape, dtype=np.int64))), "C")
    return flat.reshape(shape)


def _experts(
    folder: Path, config: Mapping[str, Any], found: Mapping[str, Any], shapes: Shapes
) -> dict[str, Factors]:
    """The factors of experts' matrices, by Bouquet's names."""
    groups = expert_parameters(list(shapes))
    targets = list(config.get("target_parameters") or [])
    chosen = []
    for target in targets:
        matches = [p for p in groups if f".{p.full_name}".endswith(f".{target}")]
        if not matches:
            raise UsageError(
                f"{folder} adapts the parameter {target}, which this run does not: name it with "
                "lora.target-parameters"
            )
        chosen += [p for p in matches if p not in chosen]
    modules: dict[str, Factors] = {}
    for parameter, beginning in peft_names(chosen).items():
        if beginning not in found:
            continue
        a, b = found[beginning]["A"], found[beginning]["B"]
        names = groups[parameter]
        if len(a) % len(names) or len(a) != b.shape[1]:
            raise UsageError(
                f"{folder}: the factors of {parameter.full_name} have {len(a)} rows and "
                f"{b.shape[1]} columns, which are not as many for each of {len(names)} experts"
            )
        scale = _scale(config, parameter.full_name, len(a) // len(names))
        modules |= zip(names, parted(a, b, len(names), scale), strict=True)
    return modules


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha / r of a module, or under rsLoRA alpha / sqrt(r), by PEFT's patterns of names."""
    wanted = _by_pattern(config["rank_pattern"], name, config["r"])
    if wanted != rank:
        raise UsageError(f"{CONFIG} says rank {wanted} for {name}, but its factors have {rank}")
    alpha = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _head(
    folder: Path, beside: Mapping[str, FloatArray], wanted: HeadShapes, labels: Sequence[str]
) -> dict[str, FloatArray]:
    """What the folder holds beside factors, which must be a head of these shapes, or nothing."""
    if not beside:
        return {}
    if odd := sorted(set(beside) - set(wanted)):
        raise UsageError(
            f"{folder} holds more than factors: {listing(odd)}, which this run does not train"
        )
    found = {name: values.shape for name, values in beside.items()}
    if found != dict(wanted):
        differ = sorted(set(found.items()) ^ set(wanted.items()))
        raise UsageError(f"{folder}: its head differs from this run's in {listing(differ)}")
    own = _labels(folder)
    if own and labels and own != tuple(labels):
        raise UsageError(
            f"{folder} was trained for the classes {listing(own)}, in this order; this run's are "
            f"{listing(labels)}: set data.labels to the same"
        )
    return {name: np.ascontiguousarray(beside[name]) for name in sorted(beside)}


def _labels(folder: Path) -> tuple[str, ...]:
    """The classes that labels.json names, in order; empty where there is no such file."""
    try:
        names = json.loads((folder / LABELS).read_text(encoding="utf-8"))["id2label"]
        return tuple(str(names[str(index)]) for index in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError):
        return ()
