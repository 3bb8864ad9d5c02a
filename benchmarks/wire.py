"""What an adapter takes on the wire over its values in float32, and what rounding costs a run.

    bytes   the packed adapter over 4 bytes for each value of its factors, with header, hash, scales
    error   ||delta - delta as received|| / ||delta||, of a random adapter
    loss    held-out loss after three rounds of four clients of ranks 16, 8, 8, 4, over that of the
            same run in float32: two seeds, the embedded model

About 0.2 MB: rank 3 on all 28 linear layers of the embedded model. About 23 MB: rank 8 on all 112
of a Llama of a thousand million parameters. Goals: float32 at most 1.03 and 1.002, the halves half
of that, int8 at most 0.255 of the large one; losses within 0.5 % of float32's.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapters.adapter import Adapter, Factors
from adapters.algebra import relative_error
from adapters.number_formats import WIRE_DTYPES
from benchmarks.measuring import Row, progress, ratios, report, run_child, simulate_command
from journal.record import FILE, read_rounds
from wire.codec import pack, unpack

JOB: dict[str, object] = {
    "rounds": 3,
    "clients.count": 4,
    "lora.rank": "16,8,8,4",
    "local.max-steps": 4,
}
QUICK: dict[str, object] = {"rounds": 1, "clients.count": 2, "local.max-steps": 1}
SEEDS = (0, 1)
COMPARED = ("bfloat16", "int8")
LOSS_GOAL = 1.005
SMALL_GOALS = {"float32": 1.03, "bfloat16": 0.53, "float16": 0.53}
LARGE_GOALS = {"float32": 1.002, "bfloat16": 0.502, "float16": 0.502, "int8": 0.255}


def linear_layers(layers: int, hidden: int, keys: int, between: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of a Llama's linear layers."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (between, hidden),
        "mlp.up_proj": (between, hidden),
        "mlp.down_proj": (hidden, between),
    }
    return {f"model.layers.{i}.{name}": shapes[name] for i in range(layers) for name in shapes}


def trained_like(shapes: dict[str, tuple[int, int]], rank: int) -> Adapter:
    """Normal factors of one rank, B smaller than A."""
    rng = np.random.default_rng(0)
    modules = {}
    for name, (m, n) in shapes.items():
        a = rng.standard_normal((rank, n), np.float32) / np.float32(n**0.5)
        b = 0.001 * rng.standard_normal((m, rank), np.float32)
        modules[name] = Factors(a, b, 2.0)
    return Adapter(modules)


def sizes(adapter: Adapter, goals: dict[str, float]) -> Iterator[Row]:
    """Bytes and error of one adapter in every number format."""
    raw = 4 * adapter.num_parameters
    for dtype in WIRE_DTYPES:
        packed = pack(adapter, dtype)
        row = f"{dtype}, {raw / 1e6:.2g} MB: bytes / raw float32"
        yield Row(row, [len(packed) / raw], goals.get(dtype), kind="share")
        if dtype != "float32":
            error = relative_error([adapter], [unpack(packed)])
            yield Row(f"{dtype}, {raw / 1e6:.2g} MB: error of the delta", [error], kind="value")


def last_loss(dtype: str, seed: int, job: dict[str, object]) -> float:
    """Held-out loss after the last round of a simulation with this number format."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        run_child(simulate_command(output, {**job, "seed": seed, "wire.dtype": dtype}))
        loss = read_rounds(output / FILE)[-1]["held_out_loss"]
    progress(f"{dtype}, seed {seed}: {loss:.6f}")
    return loss


def losses(quick: bool) -> Iterator[Row]:
    """What rounding on the wire does to the loss of a whole run."""
    job = JOB | QUICK if quick else JOB
    exact = [last_loss("float32", seed, job) for seed in SEEDS]
    for dtype in COMPARED:
        found = [last_loss(dtype, seed, job) for seed in SEEDS]
        yield Row(f"{dtype}: held-out loss / float32's", ratios(found, exact), LOSS_GOAL, "share")


def measure(quick: bool) -> Iterator[Row]:
    """Bytes of a small and a large adapter, then whole runs."""
    yield from sizes(trained_like(linear_layers(4, 256, 128, 640), 3), SMALL_GOALS)
    if not quick:
        yield from sizes(trained_like(linear_layers(16, 2048, 512, 8192), 8), LARGE_GOALS)
    yield from losses(quick)


if __name__ == "__main__":
    report(measure)
