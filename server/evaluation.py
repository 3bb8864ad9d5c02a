"""Held-out loss of the global model: by the server itself, by the clients, or both.

Only here does the server touch the base model, and only where `evaluate.server` asks for it: a
coordinator without base weights sets it to false and lets the clients evaluate.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from flwr.app import Message

from adapters.adapter import Adapter, Delta
from adapters.algebra import beyond, stack
from adapters.head import Head
from core.errors import ReplyError
from journal.record import EvaluationRecord, RoundRecord
from server.admission import Rejection, open_reply, rejection
from server.broadcast import Asked
from server.combining import Combined
from settings.keys import as_list
from settings.run import RunSettings
from settings.seeds import start_seed
from strategies.strategy import GlobalModel
from wire.messages import EVALUATE_RECORDS, EvaluateReply


def with_labels(settings: RunSettings, told: Sequence[str] = ()) -> RunSettings:
    """The settings with the order of the labels, which are the data's where no key names them.

    told: those that the clients agree on, for a server that does not evaluate and has no data.
    """
    if settings.task != "classification" or settings.data.labels:
        return settings
    labels = tuple(told)
    if settings.evaluate.server:
        from tasks.labels import label_names

        labels = label_names(settings.data, settings.task, seed=settings.seed)
    return replace(settings, data=replace(settings.data, labels=as_list(labels)))


def evaluate_on_server(model: GlobalModel, settings: RunSettings) -> RoundRecord:
    """Loss on the global held-out part, which no client trains on, and the task's metrics."""
    result = _evaluate_here(settings, model.merged, model.start, model.head)
    found = {"held_out_loss": result.loss, "held_out_tokens": result.tokens}
    return cast(
        RoundRecord, found | {f"held_out_{name}": value for name, value in result.metrics.items()}
    )


def evaluate_trained(combined: Combined, settings: RunSettings) -> RoundRecord:
    """Each client's model as it came back, on the global held-out part: before aggregation."""
    before, updates, losses = combined.before, combined.cohort.updates, {}
    for reply, update in zip(combined.replies, updates, strict=True):
        adapter = update.adapter
        if combined.freezes_tail and before.start is not None:
            adapter = stack([adapter, beyond(before.start, adapter.rank)], [1.0, 1.0])
        losses[update.client] = _evaluate_here(settings, before.merged, adapter, reply.head).loss
    mean = sum(update.weight * losses[update.client] for update in updates)
    return {"loss_before_aggregation": mean, "trained_losses": losses}


def _evaluate_here(
    settings: RunSettings, merged: Delta | None, start: Adapter | None, head: Head | None
) -> Any:
    from models.tuned_model import resident_model
    from tasks.labels import label_names
    from tasks.partition import global_held_out

    held_out = global_held_out(
        settings.data,
        settings.clients.count,
        settings.seed,
        settings.evaluate.max_examples,
        settings.task,
    )
    labels = label_names(settings.data, settings.task, seed=settings.seed)
    tuned = resident_model(settings.model, settings.lora, labels=labels)
    if head is None:
        head = tuned.initial_head(start_seed(settings))
    examples = tuned.encode(held_out, settings.data).examples
    return tuned.evaluate_global(merged, start, examples, head, settings.evaluation_tokens())


def evaluate_on_clients(
    answers: Sequence[Message], cohort: Sequence[Asked], server_round: int, base: str
) -> tuple[RoundRecord, list[Rejection]]:
    """Each client's loss on its own held-out part, of the model that it would use.

    The mean is weighted by tokens; worst and spread (standard deviation) count every client once.
    """
    names = {asked.member.node_id: asked.member.name for asked in cohort}
    data = {asked.member.name: asked.member.card.data for asked in cohort}
    heard: dict[str, EvaluationRecord] = {}
    rejected = []
    for reply in sorted(answers, key=lambda r: names.get(r.metadata.src_node_id, "")):
        name = names.get(reply.metadata.src_node_id)
        if name is None or name in heard:
            continue
        try:
            content, stamp = open_reply(reply, EVALUATE_RECORDS, server_round, base, data[name])
            heard[name] = _heard(name, EvaluateReply.from_records(content, stamp))
        except ReplyError as error:
            rejected.append(rejection(name, error, "evaluation: "))
    silent = [name for name in names.values() if name not in heard]
    told = {rejection.client for rejection in rejected}
    rejected += [Rejection(n, "evaluation: no reply in time") for n in silent if n not in told]
    result: RoundRecord = {"client_held_out": list(heard.values())}
    if heard:
        tokens = [entry["tokens"] for entry in heard.values()]
        losses = [entry["loss"] for entry in heard.values()]
        result["client_held_out_loss"] = float(np.average(losses, weights=tokens))
        result["client_held_out_worst"] = max(losses)
        result["client_held_out_spread"] = float(np.std(losses))
    return result, rejected


def _heard(name: str, reply: EvaluateReply) -> EvaluationRecord:
    entry: EvaluationRecord = {
        "client": name,
        "loss": reply.loss,
        "tokens": reply.tokens,
        "examples": reply.num_examples,
    }
    of_task = {measure.replace("-", "_"): value for measure, value in reply.measures.items()}
    return {**entry, **cast(EvaluationRecord, of_task)}
