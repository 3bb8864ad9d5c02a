"""Messages to the ClientApp as Flower makes them, without Flower's processes."""

import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

from adapters.adapter import Adapter
from client.app import app
from settings.keys import Value
from settings.run import run_settings
from tools.rehearsal.tiny_models import CONTEXT
from wire.codec import pack
from wire.messages import Instruction
from wire.records import to_record
from wire.rules import LocalRule

CLIENTS = 3
NODE = 41
SEED = 2**60 + 1
ROUND = 4
RUN = "0123456789abcdef"
Config = dict[str, Value]


def write(file: Path, count: int, word: str = "sum") -> str:
    rows = [{"prompt": f"{word} {i}", "response": f"{i} " * (1 + i % 5)} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run_config(model: Path, data: str) -> Config:
    """A run's configuration as Flower hands it over: three clients of ranks 2, 3 and 4."""
    return {
        "model.path": str(model),
        "model.device": "cpu",
        "data.path": data,
        "data.context": CONTEXT,
        "lora.rank": "2,3,4",
        "local.precision": "float32",
        "local.batch-size": 4,
        "local.max-steps": 0,
    }


def context(config: Config, client: int = 0, **own: Value) -> Context:
    """Client number `client` of three, or a site of its own; `data_path="x"` is data-path='x'."""
    node = {name.replace("_", "-"): value for name, value in own.items()}
    dealt: Config = {"partition-id": client, "num-partitions": CLIENTS}
    return Context(1, NODE, dealt | node, RecordDict(), dict(config))


def send(kind: str, content: RecordDict, to: Context) -> RecordDict:
    """What the app answers; a traceback would come through as an exception."""
    message = Message(content, dst_node_id=NODE, message_type=kind, group_id="1")
    reply = app(message, to)
    assert not reply.has_error()
    assert reply.metadata.message_type == kind
    assert reply.metadata.dst_node_id == message.metadata.src_node_id == 1  # the server's
    return reply.content


def instruct(
    config: Config,
    base: str,
    merged: Adapter | None = None,
    start: Adapter | None = None,
    **told: Value,
) -> RecordDict:
    """A train or evaluate message."""
    settings = run_settings(config)
    honest = Instruction(
        run=RUN,
        round=ROUND,
        base=base,
        version="0" * 16,
        seed=SEED,
        start_seed=5,
        wire_dtype="float32",
        optimizer="fresh",
        rule=LocalRule(),
        lora=settings.lora,
        local=settings.local,
    ).to_records()["instruction"]
    other = {name.replace("__", ".").replace("_", "-"): value for name, value in told.items()}
    instruction: Any = {**honest, **other}
    parts = {"merged": merged, "start": start}
    records: dict[str, Any] = {
        name: to_record(pack(part)) for name, part in parts.items() if part is not None
    }
    return RecordDict({"instruction": ConfigRecord(instruction), **records})
