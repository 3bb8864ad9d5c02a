"""An adapter as the two files that PEFT loads: adapter_config.json and adapter_model.safetensors.

PEFT multiplies B A by alpha / r. Here every module is written with alpha = r and its scale folded
into B, so that a module's rank may be any number, through PEFT's `rank_pattern` and
`alpha_pattern`.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from adapters.adapter import Adapter, FloatArray
from adapters.errors import AdapterError


def write_peft(adapter: Adapter, folder: Path, base_model: str) -> None:
    """Write `adapter` so that `PeftModel.from_pretrained(base, folder)` adds exactly its delta.

    base_model: what the config names as its base, a path or a hub id; PEFT only notes it.
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
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = {
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
