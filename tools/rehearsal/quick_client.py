"""A client without a model, for real SuperNodes: it is up in a second and its answers can be told.

It does what client/app.py does but train: what it answers follows from the bytes of the global
model as it has it, from its round and its name. So a wrong model, a mixed-up message or a round
played with other participants changes the bytes of the result.
"""

import hashlib
import os
import time

import numpy as np
from flwr.app import Context, RecordDict

from adapters.adapter import Adapter, Factors
from client.answering import client_app, shelf_of
from client.job import Job, open_job
from wire.codec import pack
from wire.messages import EvaluateReply, Instruction, Query, TrainMetrics, TrainReply
from wire.site_card import SiteCard

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}
BASE = "no-base"
TRAINING = "BOUQUET_QUICK_TRAINING"
"""Environment variable: how many seconds training takes."""


def loss_of(client: str, server_round: int) -> float:
    """The training loss that this client reports in this round, and no other client or round.

    >>> loss_of("oslo", 3) == loss_of("oslo", 4)
    False
    """
    digest = hashlib.sha256(f"{client} {server_round}".encode()).digest()
    return 1.0 + int.from_bytes(digest[:4]) / 2**32


def query(asked: Query, context: Context) -> SiteCard:
    """Who this site is."""
    return SiteCard(
        client=str(context.node_config["name"]),
        number=0,
        rank=_rank(context),
        num_examples=10 * _rank(context),
        base=BASE,
        shapes=tuple((name, m, n) for name, (m, n) in SHAPES.items()),
    )


def train(told: Instruction, content: RecordDict, context: Context) -> TrainReply:
    """Factors that follow from what came, this client's name and the round."""
    job = _open(told, content, context, told.round - 1)
    time.sleep(float(os.environ.get(TRAINING, "0")))
    adapter = _moved(job.begin, [told.seed, int.from_bytes(_seen(job)[:4])], told.rule.trains)
    metrics = TrainMetrics(
        num_examples=10 * _rank(context),
        loss=loss_of(str(context.node_config["name"]), told.round),
        tokens=100,
        steps=5,
        seconds=0.5,
        peak_bytes=0,
    )
    return job.reply(adapter, metrics, data="")


def evaluate(told: Instruction, content: RecordDict, context: Context) -> EvaluateReply:
    """A loss that follows from the model that this client would use."""
    job = _open(told, content, context, told.round)
    loss = 1.0 + int.from_bytes(_seen(job)[:4]) / 2**32
    return EvaluateReply(job.stamp(data=""), num_examples=4, loss=loss, tokens=10)


def _open(told: Instruction, content: RecordDict, context: Context, up_to_round: int) -> Job:
    shelf = shelf_of(context, told.run)
    return open_job(content, told, SHAPES, _rank(context), shelf, up_to_round)


def _seen(job: Job) -> bytes:
    """A hash of the whole model that this client has."""
    parts = [pack(job.begin)] if job.merged is None else [pack(job.merged), pack(job.begin)]
    return hashlib.sha256(b"".join(parts)).digest()


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


def _rank(context: Context) -> int:
    return int(context.node_config["rank"])


app = client_app(query, train, evaluate)
