"""A client without a model, for real SuperNodes: it is up in a second and its answers can be told.

It does what client/app.py does but train: what it answers follows from the bytes of the global
model as it has it, from its round and its name. So a wrong model, a mixed-up message or a round
played with other participants changes the bytes of the result.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Factors
from client.instruction import Instruction, read_instruction
from client.kept import recall, remember
from client.pieces import held_pieces, open_pieces
from client.shelf import FolderShelf, run_shelf
from client.starting import starting_factors, with_own_b
from core.errors import BouquetError
from wire.codec import pack, unpack, unpack_delta
from wire.records import from_record, to_record

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}
BASE = "no-base"
TRAINING = "BOUQUET_QUICK_TRAINING"
"""Environment variable: how many seconds training takes."""

app = ClientApp()


def loss_of(client: str, server_round: int) -> float:
    """The training loss that this client reports in this round, and no other client or round.

    >>> loss_of("oslo", 3) == loss_of("oslo", 4)
    False
    """
    digest = hashlib.sha256(f"{client} {server_round}".encode()).digest()
    return 1.0 + int.from_bytes(digest[:4]) / 2**32


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this site is and what it holds."""
    node = context.node_config
    site = ConfigRecord(
        {
            "client": str(node["name"]),
            "number": 0,
            "rank": int(node["rank"]),
            "base": BASE,
            "num-examples": 10 * int(node["rank"]),
            "modules": list(SHAPES),
            "rows": [m for m, _ in SHAPES.values()],
            "columns": [n for _, n in SHAPES.values()],
            "head": [],
            "head-shapes": [],
            "holds": held_pieces(_cache(context)),
        }
    )
    return Message(RecordDict({"site": site}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Factors that follow from what came, this client's name and the round."""
    name, own = str(context.node_config["name"]), int(context.node_config["rank"])
    told = read_instruction(message.content)
    shelf = run_shelf(_cache(context), told.run)
    try:
        begin, seen = _model(message.content, told, shelf, told.rank_of(own), told.round - 1)
    except BouquetError as error:
        return _failed(message, context, error)
    time.sleep(float(os.environ.get(TRAINING, "0")))
    adapter = _moved(begin, [told.seed, int.from_bytes(seen[:4])], told.trains)
    if told.keeps_b:
        remember(shelf, told.round, {module: f.b for module, f in adapter.items()})
    metrics: dict[str, Any] = {
        "num-examples": 10 * own,
        "loss": loss_of(name, told.round),
        "tokens": 100,
        "steps": 5,
        "seconds": 0.5,
        "peak-bytes": 0,
    }
    content = RecordDict(
        {
            "adapter": to_record(pack(adapter, told.wire_dtype, told.sends)),
            "reply": _stamp(told, context),
            "metrics": MetricRecord(metrics),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """A loss that follows from the model that this client would use."""
    told = read_instruction(message.content)
    shelf = run_shelf(_cache(context), told.run)
    rank = told.rank_of(int(context.node_config["rank"]))
    try:
        _, seen = _model(message.content, told, shelf, rank, told.round)
    except BouquetError as error:
        return _failed(message, context, error)
    metrics: dict[str, Any] = {
        "num-examples": 4,
        "loss": 1.0 + int.from_bytes(seen[:4]) / 2**32,
        "tokens": 10,
    }
    content = RecordDict({"reply": _stamp(told, context), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


def _model(
    content: RecordDict, told: Instruction, shelf: FolderShelf, rank: int, remembers: int
) -> tuple[Adapter, bytes]:
    """What this client trains from, and a hash of the whole model that it has."""
    merged, begun = None, None
    if told.pieces is not None:
        named = told.pieces, told.piece_kinds, told.start_piece
        merged, begun = open_pieces(content, *named, shelf)
    elif "merged" in content:
        merged = unpack_delta(from_record(content["merged"]))
    scale = told.lora.scale_of(rank)
    known = starting_factors(None, SHAPES, rank, scale, told.start_seed)
    start = unpack(from_record(content["start"]), known) if "start" in content else begun
    begin = starting_factors(start, SHAPES, rank, scale, told.seed)
    if told.keeps_b:
        begin = with_own_b(begin, recall(shelf, remembers))
    parts = [pack(begin)] if merged is None else [pack(merged), pack(begin)]
    return begin, hashlib.sha256(b"".join(parts)).digest()


def _moved(begin: Adapter, seeds: list[int], trains: str) -> Adapter:
    """The adapter after a random step of the factors that train."""
    rng = np.random.default_rng(seeds)
    modules = {}
    for name, f in begin.items():
        a = f.a + 0.1 * rng.standard_normal(f.a.shape, dtype=np.float32)
        b = f.b + 0.1 * rng.standard_normal(f.b.shape, dtype=np.float32)
        modules[name] = Factors(
            a if trains in ("A", "both") else f.a, b if trains in ("B", "both") else f.b, f.scale
        )
    return Adapter(modules)


def _stamp(told: Instruction, context: Context) -> ConfigRecord:
    return ConfigRecord(
        {"round": told.round, "base": told.base, "holds": held_pieces(_cache(context))}
    )


def _failed(message: Message, context: Context, error: BouquetError) -> Message:
    failure = ConfigRecord({"reason": str(error), "holds": held_pieces(_cache(context))})
    return Message(RecordDict({"failure": failure}), reply_to=message)


def _cache(context: Context) -> Path:
    return Path(str(context.node_config["cache-path"]))
