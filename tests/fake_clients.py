"""Clients without a model: they answer the server's messages with factors drawn from the seed.

For proofs about the server alone: no torch, no data, hundreds of rounds a second.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Delta, Factors, draw
from adapters.algebra import truncate
from adapters.pruning import kept_rank
from client.kept import recall, remember
from client.pieces import held_pieces, open_pieces
from client.shelf import RecordShelf, run_shelf
from client.starting import starting_factors, with_own_b
from core.errors import BouquetError
from settings.keys import Value, flatten, parse
from settings.run import LoraSettings, RunSettings, run_settings
from settings.site import client_name
from simulations.grid import InProcessGrid
from simulations.holdings import open_holdings
from tests.adapter_generators import make_adapter
from wire.codec import pack, unpack
from wire.records import from_record, to_record

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}
BASE = "fake-base"
Tamper = Callable[[int, Message, Message], Message | None]


def settings_of(output: Any, **values: Value) -> RunSettings:
    """Three fake clients of ranks 3, 2 and 1; `clients__count=2` sets clients.count."""
    layer = {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}
    fixed: dict[str, Value] = {
        "strategy.name": "flora",
        "clients.count": 3,
        "lora.rank": "3,2,1",
        "evaluate.server": False,
        "output": str(output),
    }
    return run_settings(fixed, layer)


def data_of(number: int) -> str:
    """What the client of this number says of its data."""
    return f"da7a{number:04x}"


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


def of_factors(trains: str, after: Adapter, before: Adapter) -> Adapter:
    """The factors named of `after`, the others of `before`."""
    modules = {}
    for name, f in after.items():
        a = f.a if trains in ("A", "both") else before[name].a
        b = f.b if trains in ("B", "both") else before[name].b
        modules[name] = Factors(a, b, f.scale)
    return Adapter(modules)


def fake_app(
    base: str = BASE,
    tamper: Tamper = lambda client, message, reply: reply,
    cache: Path | None = None,
    saw: Callable[[int, int, Delta | None], object] = lambda client, server_round, merged: None,
) -> ClientApp:
    """A ClientApp whose clients train by `trained`.

    tamper: called with (client number, message, honest reply); what it returns is sent instead.
    cache: each client keeps its pieces of merged in a folder of its own below this one.
    saw: called with (client number, round, merged) as the client has it.
    """
    app = ClientApp()

    def see(number: int, content: RecordDict) -> Adapter | None:
        """The start, where it is a piece."""
        told: Any = content["instruction"]
        if "pieces" not in told:
            return None
        shelf = run_shelf(cache / client_name(number), told["run"]) if cache else None
        named = told["pieces"], told["piece-kinds"], told["start-piece"]
        merged, start = open_pieces(content, *named, shelf)
        saw(number, told["round"], merged)
        return start

    def held(number: int) -> dict[str, Any]:
        return {"holds": held_pieces(cache / client_name(number))} if cache else {}

    def stamp(number: int, told: Any) -> ConfigRecord:
        belongs = {"round": told["round"], "base": told["base"], "data": data_of(number)}
        return ConfigRecord({**belongs, **held(number)})

    def failed(number: int, message: Message, error: BouquetError) -> Message:
        failure = ConfigRecord({"reason": str(error), **held(number)})
        return Message(RecordDict({"failure": failure}), reply_to=message)

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
                "head": [],
                "head-shapes": [],
                "data": data_of(number),
                **held(number),
            }
        )
        content = RecordDict({"site": site})
        ask: Any = message.content["ask"]
        if "principal-rank" in ask:
            principal = make_adapter(7, SHAPES, ask["principal-rank"], 1.0)
            content["principal"] = to_record(pack(principal))
        return _tampered(number, message, content)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        told: Any = message.content["instruction"]
        try:
            begun = see(number, message.content)
        except BouquetError as error:
            return failed(number, message, error)
        lora = parse(LoraSettings, told, "lora.")
        rank = min(lora.rank_of(number), told["rule.rank"] or 99)
        start = message.content.get("start")
        known = draw(SHAPES, rank, told["start-seed"], 1.0)
        begin = starting_factors(
            unpack(from_record(start), known) if start is not None else begun,
            SHAPES,
            rank,
            lora.scale_of(rank),
            told["seed"],
        )
        if told["rule.keeps-b"]:
            begin = with_own_b(begin, recall(RecordShelf(context.state), told["round"] - 1))
        adapter = of_factors(told["rule.trains"], trained(begin, told["seed"]), begin)
        if told["rule.keeps-b"]:
            remember(
                RecordShelf(context.state), told["round"], {n: f.b for n, f in adapter.items()}
            )
        if told["round"] == 2:
            adapter = truncate(adapter, kept_rank(rank, told["rule.prune"], told["rule.min-rank"]))
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
                    "adapter": to_record(pack(adapter, told["wire-dtype"], told["rule.sends"])),
                    "reply": stamp(number, told),
                    "metrics": MetricRecord(metrics),
                }
            ),
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        told: Any = message.content["instruction"]
        try:
            see(number, message.content)
        except BouquetError as error:
            return failed(number, message, error)
        metrics: dict[str, Any] = {"num-examples": 4, "loss": 1.0 + number, "tokens": 10}
        content: Any = {"reply": stamp(number, told), "metrics": MetricRecord(metrics)}
        return _tampered(number, message, RecordDict(content))

    def _tampered(number: int, message: Message, content: RecordDict) -> Message:
        reply = tamper(number, message, Message(content, reply_to=message))
        if reply is None:
            raise RuntimeError("this client crashed")
        return reply

    return app


def fake_grid(settings: RunSettings, app: ClientApp | None = None) -> InProcessGrid:
    """The in-process grid over fake clients, who keep what they keep beside the run."""
    keep = Path(settings.output) / "clients"
    config = flatten(settings)
    holdings = open_holdings(settings, keep)
    count = settings.clients.count
    return InProcessGrid(app or fake_app(), count, config, keep=keep, holdings=holdings)
