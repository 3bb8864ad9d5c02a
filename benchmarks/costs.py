"""What the server computes in a round: aggregation and the numbers for the log, without a model.

    500 clients of rank 4 on 14 modules of 64 x 64: at most one second, both together
    100 clients of rank 16 on the 210 linear layers of SmolLM2-135M: at most 20 seconds
    from 10 to 1,000 clients: for ten times the clients at most ten times the seconds

Clients are random factors near the start that they were sent, of equal rank. Measured is the second
round, which has a global model to go on from, with merged in the pieces that travel; what a wire, a
disk and training cost is not in it.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from adapters.adapter import Adapter, Factors, draw
from benchmarks.measuring import Row, progress, report
from server.admission import Reply
from server.broadcast import Asked, ask, broadcast_to
from server.combining import combine
from server.member import Member
from server.pieces import in_pieces
from server.telemetry import round_record
from strategies.registry import make_strategy
from strategies.strategy import GlobalModel, Strategy
from wire.messages import TrainMetrics
from wire.pieces import Piece
from wire.site_card import SiteCard

Shapes = Mapping[str, tuple[int, int]]
SMALL: Shapes = {f"layers.{k}.proj": (64, 64) for k in range(14)}
SMOLLM: Shapes = {
    f"layers.{layer}.{name}": shape
    for layer in range(30)
    for name, shape in {
        "q_proj": (576, 576),
        "k_proj": (192, 576),
        "v_proj": (192, 576),
        "o_proj": (576, 576),
        "gate_proj": (1536, 576),
        "up_proj": (1536, 576),
        "down_proj": (576, 1536),
    }.items()
}
METHODS = ("flora", "flora-warm")
CLIENTS = (10, 30, 100, 300, 1000)
REPEATS = 3
STEP = 0.02
"""Standard deviation of what training adds to each factor."""


@dataclass(frozen=True)
class Seconds:
    """Of one round."""

    aggregating: float
    telemetry: float

    @property
    def both(self) -> float:
        """Together."""
        return self.aggregating + self.telemetry


def reply(asked: Asked, start: Adapter | None, shapes: Shapes) -> Reply:
    """What a client sends that trained from this start."""
    rng, rank = np.random.default_rng(asked.member.node_id), asked.rank
    modules = {}
    for name, (m, n) in shapes.items():
        a = STEP * rng.standard_normal((rank, n), np.float32)
        b = STEP * rng.standard_normal((m, rank), np.float32)
        if start is not None:
            f = start[name]
            a[: f.rank] += f.a[:rank]
            b[:, : f.rank] += f.b[:, :rank] * np.float32(f.scale)
        modules[name] = Factors(a, b, 1.0)
    metrics = TrainMetrics(10 + asked.member.node_id, 1.0, 100, 1, 0.1, 0)
    return Reply(asked, Adapter(modules), metrics, 1000)


@dataclass(frozen=True)
class Held:
    """What the server holds between two rounds."""

    model: GlobalModel
    pieces: tuple[Piece, ...] = ()


def play(
    strategy: Strategy, held: Held, members: list[Member], shapes: Shapes, repeats: int
) -> tuple[Held, list[Seconds]]:
    """One round, computed so many times: what is held then, and what each computation took."""
    model = held.model
    asked: list[Asked] = ask(members, strategy, model)
    sent = broadcast_to(asked, model, "float32", held.pieces)
    replies = [reply(each, model.start, shapes) for each in asked]
    after, measured = held, []
    for _ in range(repeats):
        began = time.perf_counter()
        combined = combine(strategy, model, replies, asked, sent, "examples")
        new = combined.aggregated
        pieces, merged = in_pieces(held.pieces, model, new.model, "float32", new.gained)
        after = Held(replace(new.model, merged=merged), pieces)
        aggregated = time.perf_counter()
        round_record(1, combined, after.model, asked, sent, [], seed=1)
        measured.append(Seconds(aggregated - began, time.perf_counter() - aggregated))
    return after, measured


def second_round(name: str, clients: int, rank: int, shapes: Shapes, repeats: int) -> list[Seconds]:
    """The second round of a federation of so many clients."""
    strategy = make_strategy(name)
    members = [
        Member(f"client-{k:04d}", k, SiteCard(f"client-{k:04d}", k, rank, 10, "base", ()))
        for k in range(clients)
    ]
    held = Held(strategy.begin(draw(shapes, rank, 1, 1.0)))
    held, _ = play(strategy, held, members, shapes, 1)
    _, measured = play(strategy, held, members, shapes, repeats)
    progress(f"{name}, {clients} clients: {min(each.both for each in measured):.2f} s")
    return measured


def scaling(name: str, clients: tuple[int, ...] = CLIENTS) -> dict[int, list[Seconds]]:
    """Number of clients -> the second round on the 14 small modules."""
    return {count: second_round(name, count, 4, SMALL, REPEATS) for count in clients}


def measure(quick: bool) -> Iterator[Row]:
    """All of them, one after the other."""
    clients, most, modules = (
        (20, 10, dict(list(SMOLLM.items())[:7])) if quick else (500, 100, SMOLLM)
    )
    for name in METHODS:
        seconds = second_round(name, clients, 4, SMALL, REPEATS)
        yield from rows(f"{name}, {clients} clients on 14 modules of 64 x 64", seconds, 1.0)
    for name in METHODS:
        seconds = second_round(name, most, 16, modules, 2)
        yield from rows(f"{name}, {most} clients on {len(modules)} modules", seconds, 20.0)
    for name in METHODS:
        found = scaling(name, (2, 20) if quick else (10, 100, 1000))
        for fewer, more in itertools.pairwise(found):
            ratio = min(s.both for s in found[more]) / min(s.both for s in found[fewer])
            yield Row(f"{name}, {more:,} clients / {fewer:,} clients", [ratio], 10.0)


def rows(quantity: str, seconds: list[Seconds], goal: float) -> Iterator[Row]:
    """Seconds of both together, which have a goal, and the share that is telemetry."""
    yield Row(f"{quantity}, seconds", [each.both for each in seconds], goal, kind="value")
    shares = [each.telemetry / each.both for each in seconds]
    yield Row(f"{quantity}, of which telemetry", shares, kind="share")


if __name__ == "__main__":
    report(measure)
