"""The reference that federation gives up: one LoRA on everyone's data in one place.

It trains on the union of the clients' training parts, with the largest client's rank, for as many
optimizer steps as all clients took together over all rounds: the same number of examples seen, in
one run of one schedule. Its held-out loss is that of the same held-out part.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.adapter import draw
from client.training import plan_steps, train
from server.sampling import derive_seed
from server.state import write_durably
from settings.run import RunSettings
from tasks.partition import federate, global_held_out
from tasks.tuned_model import resident_model


def train_central(settings: RunSettings, steps: int) -> dict[str, Any]:
    """Train for `steps` optimizer steps on the pooled data and evaluate."""
    tuned = resident_model(settings.model, settings.lora)
    federation = federate(settings.data, settings.clients.count, settings.seed)
    examples = [
        example
        for part in federation.parts
        for example in tuned.encode(part.train, settings.data).examples
    ]
    rank = max(settings.ranks())
    seed = derive_seed(settings.seed, "central")
    once = plan_steps(len(examples), replace(settings.local, epochs=1, max_steps=0))
    local = replace(settings.local, epochs=math.ceil(steps / once), max_steps=steps)
    start = draw(tuned.shapes, rank, seed, settings.lora.scale_of(rank))
    tuned.merge(None)
    trained = train(tuned, examples, start, local, seed, dropout=settings.lora.dropout)
    held_out = global_held_out(
        settings.data, settings.clients.count, settings.seed, settings.evaluate.max_examples
    )
    loss = tuned.evaluate_global(
        None, trained.adapter, tuned.encode(held_out, settings.data).examples
    )
    return {
        "rank": rank,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "train_loss": trained.loss,
        "held_out_loss": loss.loss,
        "train_seconds": trained.seconds,
    }


def central_reference(
    settings: RunSettings, rounds: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """The reference for this run, from central.json where it was already computed."""
    steps = sum(client["steps"] for record in rounds[1:] for client in record["clients"])
    path = folder / "central.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept.get("steps") == steps:
            return kept
    result = train_central(settings, steps)
    write_durably(path, (json.dumps(result, indent=1) + "\n").encode())
    return result
