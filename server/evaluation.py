"""Held-out loss of the global model: by the server itself, by the clients, or both.

Only here does the server touch the base model, and only where `evaluate.server` asks for it: a
coordinator without base weights sets it to false and lets the clients evaluate.
"""

from collections.abc import Sequence
from typing import Any

from flwr.app import MessageType
from flwr.serverapp import Grid

from adapters.errors import AdapterError
from server.exchange import Rejection, broadcast, open_reply, read_metrics, round_messages
from server.roster import Member, Roster
from settings.run import RunSettings
from strategies.strategy import GlobalModel


def evaluate_on_server(model: GlobalModel, settings: RunSettings) -> dict[str, Any]:
    """Loss on the global held-out part, which no client trains on."""
    from tasks.partition import global_held_out
    from tasks.tuned_model import resident_model

    held_out = global_held_out(
        settings.data, settings.clients.count, settings.seed, settings.evaluate.max_examples
    )
    tuned = resident_model(settings.model, settings.lora)
    result = tuned.evaluate_global(
        model.merged, model.start, tuned.encode(held_out, settings.data).examples
    )
    return {"held_out_loss": result.loss, "held_out_tokens": result.tokens}


def evaluate_on_clients(
    grid: Grid,
    model: GlobalModel,
    settings: RunSettings,
    server_round: int,
    cohort: Sequence[Member],
    roster: Roster,
) -> tuple[dict[str, Any], list[Rejection]]:
    """Each client's loss on its own held-out part, and their mean weighted by tokens."""
    sent = broadcast(model, settings.wire.dtype)
    messages = round_messages(
        MessageType.EVALUATE, cohort, sent, settings, server_round, roster.base
    )
    names = {member.node_id: member.name for member in cohort}
    losses: dict[str, float] = {}
    total = tokens = 0.0
    rejected = []
    replies = list(grid.send_and_receive(messages, timeout=settings.clients.timeout_seconds))
    for reply in sorted(replies, key=lambda r: names.get(r.metadata.src_node_id, "")):
        name = names.get(reply.metadata.src_node_id)
        if name is None or name in losses:
            continue
        try:
            metrics = read_metrics(open_reply(reply, server_round, roster.base))
            if metrics.get("tokens", 0.0) <= 0.0 or "loss" not in metrics:
                raise AdapterError("an evaluation needs a loss and tokens above zero")
        except AdapterError as error:
            rejected.append(Rejection(name, f"evaluation: {error}"))
            continue
        losses[name] = metrics["loss"]
        total += metrics["loss"] * metrics["tokens"]
        tokens += metrics["tokens"]
    result: dict[str, Any] = {
        "client_losses": losses,
        "evaluate_bytes_down": sent.num_bytes * len(cohort),
    }
    if tokens:
        result["client_held_out_loss"] = total / tokens
    return result, rejected
