"""What goes out to the clients: the global model, packed once, and each client's orders."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, RecordDict

from adapters.codec import pack
from adapters.head import pack_head
from adapters.records import to_record
from server.roster import Member
from server.sampling import derive_seed
from settings.keys import flatten
from settings.run import RunSettings
from strategies.strategy import BOTH, GlobalModel, LocalRule, Strategy


@dataclass(frozen=True)
class Asked:
    """A client of this round's cohort, and what the method asks of it."""

    member: Member
    """With the rank that it is asked to train."""
    rule: LocalRule


@dataclass(frozen=True, eq=False)
class Broadcast:
    """The global model as it goes out: packed once, the same records for every client."""

    records: RecordDict
    num_bytes: int
    version: str
    """Hash of what the clients receive; names this global model in logs."""


def ask(cohort: Sequence[Member], strategy: Strategy, model: GlobalModel) -> list[Asked]:
    """The rule for each member of the cohort."""
    asked = []
    for member in cohort:
        rule = strategy.local_rule(model, member.name)
        rank = min(member.rank, rule.rank) if rule.rank else member.rank
        asked.append(Asked(replace(member, rank=rank), rule))
    return asked


def broadcast(model: GlobalModel, wire_dtype: str, receives: str = BOTH) -> Broadcast:
    """Pack `merged`, `start` and `head`; what is None is left out.

    receives: the factors of `start` that travel.
    """
    packed: dict[str, bytes] = {}
    if model.merged is not None:
        packed["merged"] = pack(model.merged, wire_dtype)
    if model.start is not None:
        packed["start"] = pack(model.start, wire_dtype, receives)
    if model.head is not None:
        packed["head"] = pack_head(model.head)
    digest = hashlib.sha256()
    for name, data in packed.items():
        digest.update(name.encode() + data)
    return Broadcast(
        RecordDict({name: to_record(data) for name, data in packed.items()}),
        sum(len(data) for data in packed.values()),
        digest.hexdigest()[:16],
    )


def broadcast_to(asked: Sequence[Asked], model: GlobalModel, wire_dtype: str) -> Broadcast:
    """What this cohort receives; a method asks all of it for the same factors."""
    return broadcast(model, wire_dtype, asked[0].rule.receives if asked else BOTH)


def start_seed(settings: RunSettings) -> int:
    """The seed of the factors and the head that every client begins the run with."""
    return derive_seed(settings.seed, "start")


def round_messages(
    kind: str,
    asked: Sequence[Asked],
    sent: Broadcast,
    settings: RunSettings,
    server_round: int,
    base: str,
) -> list[Message]:
    """A `train` or `evaluate` message for each member of the cohort."""
    shared = {
        "round": server_round,
        "base": base,
        "version": sent.version,
        "start-seed": start_seed(settings),
        "start.optimizer": settings.start.optimizer,
        "wire-dtype": settings.wire.dtype,
        **flatten(settings.lora, "lora."),
        **flatten(settings.local, "local."),
    }
    return [
        Message(
            RecordDict(
                {
                    **sent.records,
                    "instruction": ConfigRecord(
                        {
                            **shared,
                            **flatten(each.rule, "rule."),
                            "seed": derive_seed(settings.seed, server_round, each.member.name),
                        }
                    ),
                }
            ),
            dst_node_id=each.member.node_id,
            message_type=kind,
            group_id=str(server_round),
        )
        for each in asked
    ]
