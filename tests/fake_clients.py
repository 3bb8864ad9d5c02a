"""Clients without a model: they answer the server's messages with factors drawn from the seed.

For proofs about the server alone: no torch, no data, hundreds of rounds a second.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Delta, Factors
from adapters.algebra import truncate
from adapters.pruning import kept_rank
from client.answering import client_app, shelf_of
from client.job import Job, open_job
from server.admission import Reply
from server.broadcast import Asked
from server.member import Member
from settings.keys import Value, flatten
from settings.run import RunSettings, run_settings
from settings.site import client_name
from simulations.grid import InProcessGrid
from simulations.holdings import open_holdings
from tests.adapter_generators import make_adapter
from wire.codec import pack
from wire.messages import EvaluateReply, Instruction, Query, TrainMetrics, TrainReply
from wire.rules import LocalRule
from wire.site_card import SiteCard

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8), "layers.1.q_proj": (6, 8)}
MODULES = tuple((name, m, n) for name, (m, n) in SHAPES.items())
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


def member_named(name: str, node: int = 1, rank: int = 2, **card: Any) -> Member:
    """A member of a run with fake clients; keywords are those of its SiteCard."""
    told = {"number": 0, "num_examples": 10, "base": BASE, "shapes": MODULES, **card}
    return Member(name, node, SiteCard(client=name, rank=rank, **told))


def replied(
    adapter: Adapter,
    client: str = "c",
    rank: int | None = None,
    rule: LocalRule | None = None,
    **metrics: Any,
) -> Reply:
    """An admitted reply with this adapter, asked for at its own rank unless another is given."""
    asked = Asked(member_named(client, rank=rank or adapter.rank), rule or LocalRule())
    return Reply(asked, adapter, counted(**metrics), 100)


def counted(**metrics: Any) -> TrainMetrics:
    """What an honest client counts; keywords say otherwise."""
    told = {"num_examples": 10, "loss": 1.0, "tokens": 5, "steps": 2, "seconds": 0.1, **metrics}
    return TrainMetrics(peak_bytes=0, **told)


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

    def open_as(
        number: int, told: Instruction, content: RecordDict, context: Context, up_to_round: int
    ) -> Job:
        rank, shelf = told.lora.rank_of(number), shelf_of(context, told.run)
        job = open_job(content, told, SHAPES, rank, shelf, up_to_round)
        if told.parts is not None:
            saw(number, told.round, job.merged)
        return job

    def query(asked: Query, context: Context) -> SiteCard:
        number, principal = _number(context), None
        if asked.principal_rank:
            principal = pack(make_adapter(7, SHAPES, asked.principal_rank, 1.0))
        return SiteCard(
            client=client_name(number),
            number=number,
            rank=run_settings(context.run_config).lora.rank_of(number),
            num_examples=10 * (number + 1),
            base=base,
            shapes=MODULES,
            data=data_of(number),
            principal=principal,
        )

    def train(told: Instruction, content: RecordDict, context: Context) -> TrainReply:
        number = _number(context)
        job = open_as(number, told, content, context, told.round - 1)
        adapter = of_factors(told.rule.trains, trained(job.begin, told.seed), job.begin)
        if told.round == 2:
            adapter = truncate(adapter, kept_rank(job.rank, told.rule.prune, told.rule.min_rank))
        metrics = TrainMetrics(
            num_examples=10 * (number + 1),
            loss=2.0 - 0.1 * told.round,
            tokens=100,
            steps=5,
            seconds=0.5,
            peak_bytes=0,
        )
        control = (
            make_adapter(told.seed % 2**32, SHAPES, job.rank, 1.0) if told.rule.control else None
        )
        return job.reply(adapter, metrics, data_of(number), control=control)

    def evaluate(told: Instruction, content: RecordDict, context: Context) -> EvaluateReply:
        number = _number(context)
        job = open_as(number, told, content, context, told.round)
        return EvaluateReply(job.stamp(data_of(number)), 4, 1.0 + number, 10)

    def spoil(
        message: Message, context: Context, answer: Callable[[Message, Context], Message]
    ) -> Message:
        number = _number(context)
        if cache is not None:
            context.node_config["cache-path"] = str(cache / client_name(number))
        reply = tamper(number, message, answer(message, context))
        if reply is None:
            raise RuntimeError("this client crashed")
        return reply

    return client_app(query, train, evaluate, [spoil])


def _number(context: Context) -> int:
    return int(context.node_config["partition-id"])


def fake_grid(settings: RunSettings, app: ClientApp | None = None) -> InProcessGrid:
    """The in-process grid over fake clients, who keep what they keep beside the run."""
    keep = Path(settings.output) / "clients"
    config = flatten(settings)
    holdings = open_holdings(settings, keep)
    count = settings.clients.count
    return InProcessGrid(app or fake_app(), count, config, keep=keep, holdings=holdings)
