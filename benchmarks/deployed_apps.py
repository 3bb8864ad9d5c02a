"""The apps of benchmarks/deployed.py: rounds that train nothing, in three forms, in turn.

    bouquet       Bouquet's server and its packed adapter
    flower        Flower's own FedAvg, an array for each tensor
    raw           one uint8 array of the adapter's size, sent and received

A client changes what it received, so that no two messages of a round carry the same bytes: Flower
stores an object that it has already only once.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from adapters.adapter import Adapter, Factors
from benchmarks.wire import linear_layers
from client.answering import client_app as bouquet_app
from client.answering import shelf_of
from client.job import open_job
from core.events import log_to_stdout
from server.admission import Rejection
from server.progress import LogObserver, observe_run
from server.rounds import run_rounds
from settings.keys import Value
from settings.run import run_settings
from wire.messages import EvaluateReply, Instruction, Query, TrainMetrics, TrainReply
from wire.site_card import SiteCard

JOB = "BOUQUET_DEPLOYED_JOB"
"""Environment variable: layers, rank, rounds, and the file for the seconds."""
BASE = "no-base"
TIMEOUT = 300.0
VARIANTS = ("bouquet", "flower", "raw")


def job() -> dict[str, Any]:
    """What is to be measured."""
    found: dict[str, Any] = json.loads(os.environ[JOB])
    return found


def shapes() -> dict[str, tuple[int, int]]:
    """Seven modules a layer; at layers x rank = 256, some 22 MB in float32."""
    return linear_layers(job()["layers"], 1024, 256, 4096)


server_app = ServerApp()


class Turns(LogObserver):
    """Times Bouquet's rounds, and after each lets the other two have theirs."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self._grid = grid
        self._strategy = FedAvg(fraction_evaluate=0.0)
        rng = np.random.default_rng(0)
        values = {
            name: rng.standard_normal(shape, np.float32)
            for module, (m, n) in shapes().items()
            for name, shape in (
                (f"{module}.A", (job()["rank"], n)),
                (f"{module}.B", (m, job()["rank"])),
            )
        }
        size = sum(array.nbytes for array in values.values())
        self._tensors = ArrayRecord({name: Array(value) for name, value in values.items()})
        self._raw = np.frombuffer(rng.bytes(size), np.uint8)
        self._began = time.perf_counter()
        self.seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.parts: list[dict[str, float]] = []

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """A round is committed: from here to there is all that it takes."""
        if rejected:
            raise RuntimeError(f"round {record['round']} is incomplete: {rejected}")
        if record["round"] > 0:
            self._note("bouquet")
            self.parts.append({n: v for n, v in record.items() if n.endswith("seconds")})
            self._flower()
            self._note("flower")
            self._send_raw()
            self._note("raw")
        self._began = time.perf_counter()

    def _note(self, variant: str) -> None:
        self.seconds[variant].append(time.perf_counter() - self._began)
        told = {"seconds": self.seconds, "parts": self.parts}
        Path(job()["output"]).write_text(json.dumps(told))
        self._began = time.perf_counter()

    def _flower(self) -> None:
        result = self._strategy.start(self._grid, self._tensors, num_rounds=1, timeout=TIMEOUT)
        if result.arrays is None or len(result.arrays) != len(self._tensors):
            raise RuntimeError("Flower's FedAvg got no reply")
        self._tensors = result.arrays

    def _send_raw(self) -> None:
        nodes = list(self._grid.get_node_ids())
        content = RecordDict({"raw": ArrayRecord({"raw": Array(self._raw)})})
        messages = [Message(content, dst_node_id=n, message_type="train") for n in nodes]
        replies = list(self._grid.send_and_receive(messages, timeout=TIMEOUT))
        if len(replies) != 2 or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"{len(replies)} of 2 replies")
        self._raw = replies[0].content.array_records["raw"]["raw"].numpy()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Rounds of the three variants in turn."""
    log_to_stdout()
    fixed: dict[str, Value] = {
        "strategy.name": "fedavg",
        "rounds": job()["rounds"],
        "lora.rank": str(job()["rank"]),
        "clients.min-replies": 2,
        "clients.timeout-seconds": TIMEOUT,
        "evaluate.server": False,
        "output": str(Path(job()["output"]).with_name("run")),
    }
    with observe_run(Turns(grid)):
        run_rounds(grid, run_settings(fixed))


def query(asked: Query, context: Context) -> SiteCard:
    """Who this is."""
    return SiteCard(
        client=str(context.node_config["name"]),
        number=0,
        rank=job()["rank"],
        num_examples=10,
        base=BASE,
        shapes=tuple((name, m, n) for name, (m, n) in shapes().items()),
    )


def train(told: Instruction, content: RecordDict, context: Context) -> TrainReply:
    """What came, with one value in every array changed by this client."""
    task = open_job(content, told, shapes(), job()["rank"], shelf_of(context, told.run), 0)
    start = cast(Adapter, task.start)
    adapter = Adapter(
        {
            name: Factors(_touched(f.a, _mine(context)), _touched(f.b, _mine(context)), f.scale)
            for name, f in start.items()
        }
    )
    return task.reply(adapter, TrainMetrics(10, 1.0, 1, 1, 0.1, 0), data="")


def evaluate(told: Instruction, content: RecordDict, context: Context) -> EvaluateReply:
    """Nobody asks."""
    raise NotImplementedError


def others(
    message: Message, context: Context, answer: Callable[[Message, Context], Message]
) -> Message:
    """What Flower's own and the raw variant are answered; Bouquet's messages go on."""
    content = message.content
    if "raw" in content:
        raw = content.array_records["raw"]["raw"].numpy().copy()
        raw[:: 1 << 20] ^= np.uint8(_mine(context))
        reply = RecordDict({"raw": ArrayRecord({"raw": Array(raw)})})
        return Message(reply, reply_to=message)
    if "arrays" in content:
        changed = {
            name: Array(_touched(array.numpy(), _mine(context)))
            for name, array in content.array_records["arrays"].items()
        }
        metrics = MetricRecord({"num-examples": 10})
        reply = RecordDict({"arrays": ArrayRecord(changed), "metrics": metrics})
        return Message(reply, reply_to=message)
    return answer(message, context)


def _mine(context: Context) -> np.float32:
    return np.float32(len(str(context.node_config["name"])))


def _touched(values: Any, mine: np.float32) -> Any:
    """A copy with its first value raised."""
    values = values.copy()
    values[0, 0] += mine
    return values


client_app = bouquet_app(query, train, evaluate, [others])
