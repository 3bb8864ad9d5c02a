"""Clients without a model: they answer the server's messages with factors drawn from the seed.

For proofs about the server alone: no torch, no data, hundreds of rounds a second.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Factors
from adapters.codec import pack, unpack
from adapters.records import from_record, to_record
from client.site import starting_factors
from settings.keys import Value, flatten, parse
from settings.run import LoraSettings, RunSettings, run_settings
from settings.site import client_name
from simulations.grid import InProcessGrid

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}
BASE = "fake-base"
Tamper = Callable[[int, Message, Message], Message | None]


def settings_of(output: Any, **values: Value) -> RunSettings:
    """Three fake clients of ranks 3, 2 and 1; `clients__count=2` sets clients.count."""
    layer = {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}
    fixed: dict[str, Value] = {
        "clients.count": 3,
        "lora.rank": "3,2,1",
        "evaluate.server": False,
        "output": str(output),
    }
    return run_settings(fixed, layer)


def trained(adapter: Adapter, seed: int) -> Adapter:
    """The adapter after a random step of all its factors."""
    rng = np.random.default_rng([seed, 99])
    return Adapter(
        {
            name: Factors(
                f.a + 0.1 * rng.standard_normal(f.a.shape, dtype=np.float32),
                f.b + 0.1 * rng.standard_normal(f.b.shape, dtype=np.float32),
                f.scale,
            )
            for name, f in adapter.items()
        }
    )


def fake_app(base: str = BASE, tamper: Tamper = lambda client, message, reply: reply) -> ClientApp:
    """A ClientApp whose clients train by `trained`.

    tamper: called with (client number, message, honest reply); what it returns is sent instead.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        lora = run_settings(context.run_config).lora
        site = ConfigRecord(
            {
                "client": client_name(number),
                "number": number,
                "rank": lora.rank_of(number),
                "base": base,
                "num-examples": 10 * (number + 1),
                "modules": list(SHAPES),
                "rows": [m for m, _ in SHAPES.values()],
                "columns": [n for _, n in SHAPES.values()],
            }
        )
        return _tampered(number, message, RecordDict({"site": site}))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        told: Any = message.content["instruction"]
        lora = parse(LoraSettings, told, "lora.")
        rank = lora.rank_of(number)
        start = message.content.get("start")
        begin = starting_factors(
            unpack(from_record(start)) if start is not None else None,
            SHAPES,
            rank,
            lora.scale_of(rank),
            told["seed"],
        )
        adapter = trained(begin, told["seed"])
        metrics: dict[str, Any] = {
            "num-examples": 10 * (number + 1),
            "loss": 2.0 - 0.1 * told["round"],
            "tokens": 100,
            "steps": 5,
            "seconds": 0.5,
            "peak-bytes": 0,
        }
        return _tampered(
            number,
            message,
            RecordDict(
                {
                    "adapter": to_record(pack(adapter, told["wire-dtype"])),
                    "reply": ConfigRecord({"round": told["round"], "base": told["base"]}),
                    "metrics": MetricRecord(metrics),
                }
            ),
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        told: Any = message.content["instruction"]
        metrics: dict[str, Any] = {"num-examples": 4, "loss": 1.0 + number, "tokens": 10}
        reply = ConfigRecord({"round": told["round"], "base": told["base"]})
        return _tampered(
            number, message, RecordDict({"reply": reply, "metrics": MetricRecord(metrics)})
        )

    def _tampered(number: int, message: Message, content: RecordDict) -> Message:
        reply = tamper(number, message, Message(content, reply_to=message))
        if reply is None:
            raise RuntimeError("this client crashed")
        return reply

    return app


def fake_grid(settings: RunSettings, app: ClientApp | None = None) -> InProcessGrid:
    """The in-process grid over fake clients."""
    return InProcessGrid(app or fake_app(), settings.clients.count, flatten(settings))
