"""An adapter as the two files that PEFT loads: adapter_config.json and adapter_model.safetensors.

PEFT multiplies B A by alpha / r. Here every module is written with alpha = r and its scale folded
into B, so that a module's rank may be any number, through PEFT's `rank_pattern` and
`alpha_pattern`. A classification head goes beside it whole, as PEFT's `modules_to_save`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapters.adapter import Adapter, FloatArray
from adapters.errors import AdapterError
from adapters.head import Head

PREFIX = "base_model.model."


def write_peft(
    adapter: Adapter,
    folder: Path,
    base_model: str,
    head: Head | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write `adapter` so that `PeftModel.from_pretrained(base, folder)` adds exactly its delta.

    base_model: what the config names as its base, a path or a hub id; PEFT only notes it.
    head: what trained beside it; base is then a sequence classifier of as many labels, and PEFT
    puts these values in place of its own.
    labels: in the order of the classes; they go to labels.json, as transformers' configs name them.

    A module of rank 0 is written as rank 1 with zeros, because PEFT knows no rank 0.
    """
    if not adapter:
        raise AdapterError("there is no module in this adapter: nothing to write")
    tensors: dict[str, FloatArray] = {}
    ranks = {}
    for name, factors in adapter.items():
        m, n = factors.shape
        ranks[name] = max(factors.rank, 1)
        a, b = np.zeros((ranks[name], n), np.float32), np.zeros((m, ranks[name]), np.float32)
        a[: factors.rank] = factors.a
        b[:, : factors.rank] = factors.b * np.float32(factors.scale)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    if head:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": modules_to_save(list(head))}
        for name, values in head.items():
            tensors[PREFIX + name] = np.asarray(values, np.float32, order="C")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if labels:
        classes = {
            "id2label": {str(index): label for index, label in enumerate(labels)},
            "label2id": {label: index for index, label in enumerate(labels)},
        }
        text = json.dumps(classes, indent=2, ensure_ascii=False) + "\n"
        (folder / "labels.json").write_text(text, encoding="utf-8")


def modules_to_save(parameters: Sequence[str]) -> list[str]:
    """The modules that hold these parameters of a head: the outermost ones, or a base's pooler.

    >>> modules_to_save(["classifier.dense.weight", "score.weight", "bert.pooler.dense.bias"])
    ['classifier', 'pooler', 'score']
    """
    parts = [name.split(".") for name in parameters]
    return sorted({"pooler" if "pooler" in path[:-1] else path[0] for path in parts})
