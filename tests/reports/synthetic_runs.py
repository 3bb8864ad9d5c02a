"""Runs that never ran: plausible records of any number of strategies, seeds, rounds and clients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from journal.results import Run
from journal.state import ServerState, save_state
from settings.keys import flatten
from settings.run import run_settings
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import GlobalModel
from tests.adapter_generators import make_adapter

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
VERSIONS = {"bouquet": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}
EXACT = {"flora", "ffa-lora", "rolora", "fedex-lora", "ideal"}


def synthetic_run(
    folder: Path,
    name: str,
    seed: int = 0,
    rounds: int = 8,
    clients: int = 10,
    modules: int = 24,
    classify: bool = False,
    state: bool = True,
) -> Run:
    """A run that looks as if it had been; `central` and `local` have a first and a last record."""
    kind = [*STRATEGIES].index(name) if name in STRATEGIES else 0
    rng = np.random.default_rng([seed, kind])
    names = [f"client-{k:02d}" for k in range(clients)]
    layers = [f"model.layers.{k // 4}.{KINDS[k % 4]}" for k in range(modules)]
    config = {**flatten(run_settings({"seed": seed, "rounds": rounds}))}
    if name in STRATEGIES:
        config["strategy.name"] = name
    personal = name in STRATEGIES and make_strategy(name).properties.personal
    base = 4.85 + 0.02 * seed
    depth = 0.8 + 0.25 * np.sin(kind * 1.7)

    def quality(share: float) -> dict[str, Any]:
        gain = depth * (1 - np.exp(-2.2 * share))
        loss = float(base - gain + rng.normal(0, 0.012))
        own = [
            {
                "client": client,
                "loss": loss + 0.35 * float(np.sin(k * 2.1)) + float(rng.normal(0, 0.03)),
                "examples": 20 + k,
                **({"accuracy": float(rng.uniform(0.3, 0.5) + 0.4 * share)} if classify else {}),
            }
            for k, client in enumerate(names)
        ]
        found = {} if personal else {"held_out_loss": loss}
        if classify and not personal:
            found["held_out_accuracy"] = float(0.25 + 0.5 * share * depth + rng.normal(0, 0.01))
            found["held_out_macro_f1"] = float(0.2 + 0.48 * share * depth)
        mean = float(np.mean([each["loss"] for each in own]))
        return {**found, "client_held_out": own, "client_held_out_loss": mean}

    records: list[dict[str, Any]] = [{"round": 0, **quality(0.0), "evaluate_seconds": 2.0}]
    if name not in STRATEGIES:
        reached = quality(1.3 if name == "central" else 0.3)
        end = {"round": rounds, **reached, "bytes_up": 0, "bytes_down": 0}
        records.append({**end, "failures": [], "seconds": 40.0})
        return Run(name, seed, folder, config, VERSIONS, records)
    level = 4e-8 if name in EXACT else 10.0 ** (-0.6 - 0.17 * kind)
    grows = name in ("flora", "fedex-lora", "florist", "ideal")
    for at in range(1, rounds + 1):
        noise = 0.0 if name == "ideal" else float(level * np.exp(rng.normal(0, 0.2)))
        own_ranks = [RANKS[k % len(RANKS)] if grows else 8 for k in range(clients)]
        cosine = np.full((clients, clients), 0.08) + rng.normal(0, 0.06, (clients, clients))
        cosine = (cosine + cosine.T) / 2
        np.fill_diagonal(cosine, 1.0)
        up = [rank * 72_000 for rank in own_ranks]
        down = [
            sum(own_ranks) * 72_000 * (at - 1) if grows else rank * 72_000 for rank in own_ranks
        ]
        size = 4.0 + 2.0 * np.sin(kind * 0.9) + (9.0 if name == "frlora" else 0.0)
        moved = [float(size * np.exp(rng.normal(0.0, 0.15)) / at**0.3) for _ in names]
        seconds = {
            "train_seconds": float(rng.uniform(9, 11)),
            "aggregate_seconds": float(rng.uniform(0.1, 3.0)),
            "telemetry_seconds": float(rng.uniform(0.2, 0.9)),
            "evaluate_seconds": float(rng.uniform(2, 3)),
        }
        records.append(
            {
                "round": at,
                "train_loss": float(base - 0.1 - depth * at / rounds),
                **quality(at / rounds),
                **({} if personal else {"loss_before_aggregation": base - depth * at / rounds}),
                "mean_change_norm": None if personal else float(np.mean(moved)),
                "aggregation_noise": None if personal else noise,
                "noise_relative_to_model": None if personal else noise / at,
                "ideal_change_norm": None if personal else 0.7 * float(np.mean(moved)),
                "effective_rank": float(20 + 3 * kind - at + rng.normal()),
                "global_rank": sum(own_ranks) * at if grows else 8,
                "bytes_up": sum(up),
                "bytes_down": sum(down),
                **seconds,
                "seconds": sum(seconds.values()) + 0.4,
                "clients": [
                    {
                        "client": c,
                        "rank": r,
                        "weight": 1 / clients,
                        "change_norm": None if personal else m,
                        "bytes_up": u,
                        "bytes_down": d,
                    }
                    for c, r, m, u, d in zip(names, own_ranks, moved, up, down, strict=True)
                ],
                "cosine": np.round(cosine, 4).tolist(),
                "failures": [{"client": "client-03", "reason": "reply was late"}]
                if at == 2 and kind == 1
                else [],
                "module_noise": {
                    layer: None
                    if personal
                    else noise * float(np.exp(rng.normal(0.1 * (k % 4), 0.3)))
                    for k, layer in enumerate(layers)
                },
                "module_distribution_noise": {
                    layer: 0.0 if grows else float(rng.uniform(0.01, 0.3)) for layer in layers
                },
            }
        )
    if state:
        save_synthetic_state(folder, layers[:6], rounds, 60 if grows else 8, seed)
    return Run(name, seed, folder, config, VERSIONS, records)


def save_synthetic_state(
    folder: Path, modules: Sequence[str], rounds: int, rank: int, seed: int
) -> None:
    """A server's state whose global adapter has this rank."""
    shapes = dict.fromkeys(modules, (96, 64))
    adapter = make_adapter(seed, shapes, rank, 0.01)
    model = GlobalModel(merged=adapter)
    save_state(ServerState(rounds, model, "base", shapes, log_bytes=0), folder / "state")
