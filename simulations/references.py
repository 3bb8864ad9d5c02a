"""What the references to federation have in common: the same model, data and held-out parts.

A reference is written like a run: config.toml, and rounds.jsonl with the base model as round 0 and
the end as the last round. Nothing travels in it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapters.adapter import Adapter
from adapters.head import Head
from client.training import Trained
from core.errors import UsageError
from journal.record import EvaluationRecord, RoundRecord
from journal.results import CENTRAL, LOCAL, REFERENCE_KEY
from journal.run_folder import RunFolder
from models.tuned_model import TunedModel, resident_model
from server.start_adapter import read_start_adapter
from settings.run import RunSettings
from settings.seeds import start_seed
from settings.site import client_name
from tasks.encoding import Encoded
from tasks.examples import Examples
from tasks.labels import label_names
from tasks.partition import Federation, federate, global_held_out


@dataclass(frozen=True, eq=False)
class Bench:
    """The model and the data of a run, without federation."""

    settings: RunSettings
    tuned: TunedModel
    federation: Federation
    held_out: list[Encoded]
    """The global held-out part; empty where the server does not evaluate."""
    head: Head
    """What trains beside the factors, as it is before any training; empty under most tasks."""
    merged: Adapter | None = None
    """What the run begins from besides the base: start.adapter."""

    def encode(self, examples: Examples) -> list[Encoded]:
        """These examples as a client encodes them."""
        return self.tuned.encode(examples, self.settings.data).examples

    def evaluate(self, model: Trained | None, examples: Sequence[Encoded]) -> dict[str, Any]:
        """Loss and metrics of a model, or of what the run begins from."""
        adapter, head = (model.adapter, model.head) if model is not None else (None, self.head)
        tokens = self.settings.evaluation_tokens()
        result = self.tuned.evaluate_global(self.merged, adapter, examples, head, tokens)
        return {"loss": result.loss, "tokens": result.tokens, **result.metrics}

    def evaluate_globally(self, model: Trained | None) -> RoundRecord:
        """Its metrics on the global held-out part, named as in rounds.jsonl."""
        if not self.held_out:
            return {}
        found = self.evaluate(model, self.held_out)
        return cast(RoundRecord, {f"held_out_{name}": value for name, value in found.items()})

    def evaluate_client(self, number: int, model: Trained | None) -> EvaluationRecord:
        """Its metrics on what this client holds out; {} where that is nothing."""
        part = self.federation.parts[number].held_out
        if not part:
            return {}
        examples = self.encode(part)
        found = self.evaluate(model, examples)
        who: EvaluationRecord = {"client": client_name(number), "examples": len(examples)}
        return {**who, **cast(EvaluationRecord, found)}

    def evaluate_clients(self, model: Trained | None) -> RoundRecord:
        """One model on what each client holds out, named as in rounds.jsonl."""
        numbers = range(len(self.federation.parts))
        return client_metrics([self.evaluate_client(number, model) for number in numbers])


def open_bench(settings: RunSettings) -> Bench:
    """The model and the data that every client and the server of this run have."""
    data, clients, seed, task = (
        settings.data,
        settings.clients.count,
        settings.seed,
        settings.task,
    )
    labels = label_names(data, task, seed=seed)
    tuned = resident_model(settings.model, settings.lora, labels=labels)
    start = read_start_adapter(settings, tuned.shapes, tuned.head_shapes, labels)
    held_out: list[Encoded] = []
    if settings.evaluate.server:
        examples = global_held_out(data, clients, seed, settings.evaluate.max_examples, task)
        held_out = tuned.encode(examples, data).examples
    return Bench(
        settings=settings,
        tuned=tuned,
        federation=federate(data, clients, seed, task),
        held_out=held_out,
        head=(start.head if start else {}) or tuned.initial_head(start_seed(settings)),
        merged=start.adapter if start else None,
    )


def client_metrics(found: Sequence[EvaluationRecord]) -> RoundRecord:
    """What clients found on their own held-out parts, and its mean weighted by tokens."""
    heard = [each for each in found if each]
    if not heard:
        return {}
    tokens = sum(each["tokens"] for each in heard)
    mean = sum(each["loss"] * each["tokens"] for each in heard) / tokens
    return {"client_held_out": heard, "client_held_out_loss": mean}


def run_reference(
    name: str, settings: RunSettings, on_phase: Callable[[str], None] = lambda phase: None
) -> list[RoundRecord]:
    """Compute a reference into settings.output, from the beginning; its records.

    on_phase: called with a few words before each part of the work.
    """
    from simulations.central import play_central
    from simulations.local import play_local

    play = {CENTRAL: play_central, LOCAL: play_local}[name]
    if not (settings.evaluate.server or settings.evaluate.clients):
        raise UsageError(f"{name} has nothing to compare: set evaluate.server or evaluate.clients")
    folder = RunFolder(Path(settings.output))
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.create(settings, head={REFERENCE_KEY: name})
    on_phase("evaluating the base")
    began = time.perf_counter()
    bench = open_bench(settings)
    base: RoundRecord = {"round": 0, **bench.evaluate_globally(None)}
    if settings.evaluate.clients:
        base |= bench.evaluate_clients(None)
    base["evaluate_seconds"] = time.perf_counter() - began
    folder.append(base)
    began = time.perf_counter()
    end: RoundRecord = {"round": settings.rounds, **play(bench, on_phase)}
    end |= {"bytes_up": 0, "bytes_down": 0, "failures": []}
    end["seconds"] = time.perf_counter() - began
    folder.append(end)
    return folder.rounds()
