"""Runs whose adapters are rounded on the wire: near the exact run, and the log says how near."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from adapters.adapter import Adapter, Factors
from journal.run_folder import RunFolder
from journal.state import load_state
from server.broadcast import Broadcast, broadcast, broadcast_error, received_start
from server.rounds import run_rounds
from strategies.noise import compare, ideal_change
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, GlobalModel, Update
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, add, dense_deltas, distance, frobenius
from tests.fake_clients import SHAPES, fake_app, fake_grid, settings_of
from wire.codec import pack, unpack
from wire.records import from_record

MERGED = make_adapter(1, SHAPES, 4, 0.5)
START = make_adapter(2, SHAPES, 3, 2.0)
HOW_FAR = {"bfloat16": (1e-4, 0.01), "float16": (1e-5, 0.002), "int8": (1e-4, 0.03)}


def play(folder: Path, dtype: str, strategy: str, rounds: int = 3, app: Any = None) -> Path:
    ranks = "3,2,1" if make_strategy(strategy).properties.mixed_ranks else "2"
    settings = settings_of(
        folder, strategy__name=strategy, lora__rank=ranks, wire__dtype=dtype, rounds=rounds
    )
    return run_rounds(fake_grid(settings, app), settings)


def final_deltas(folder: Path) -> Deltas:
    state = load_state(folder / "state")
    assert state is not None
    assert state.model.start is not None or state.model.merged is not None
    # FedSA-LoRA's start has B = 0: what its run ends with is the A.
    return {
        name: delta if delta.any() else np.asarray(state.model.start[name].a, np.float64)  # type: ignore[index]
        for name, delta in dense_deltas(state.model.total()).items()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_run_rounded_on_the_wire_ends_near_the_exact_one(
    strategy: str, dtype: str, tmp_path: Path
) -> None:
    # The fake clients step along coordinates, and flora-warm's start may flip its signs.
    rounds = 1 if strategy == "flora-warm" else 3
    exact = final_deltas(play(tmp_path / "exact", "float32", strategy, rounds))
    rounded_run = play(tmp_path / "rounded", dtype, strategy, rounds)
    away = distance(exact, final_deltas(rounded_run)) / frobenius(exact)
    assert 0.0 < away < 0.04
    records = RunFolder(rounded_run).rounds()[1:]
    assert [record["failures"] for record in records] == [[]] * rounds
    if make_strategy(strategy).properties.exact and strategy in ("flora", "ideal"):
        assert max(record["aggregation_noise"] for record in records) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_of_an_exact_method_the_noise_is_what_the_wire_did_to_the_start(dtype: str) -> None:
    """Clients change what they received, and the server goes on from what it had."""
    before = GlobalModel(start=START)
    sent = broadcast(before, dtype)
    began = received_start(before, sent)
    assert began is not None
    trained = [stepped(began, seed) for seed in (1, 2, 3)]
    updates = Cohort([Update(f"c{k}", 1 / 3, adapter) for k, adapter in enumerate(trained)])
    after = make_strategy("fedex-lora").aggregate(before, updates).model
    found = compare(before, after, ideal_change(updates, began))
    changes = [add(dense_deltas(x), dense_deltas(began), -1.0) for x in trained]
    ideal = {n: sum(c[n] for c in changes) / 3 for n in SHAPES}
    rounded = distance(dense_deltas(START), dense_deltas(began)) / frobenius(ideal)
    assert found.noise == pytest.approx(rounded, rel=1e-3, abs=1e-5)
    assert found.noise is not None
    assert (found.noise > 1e-3) == (dtype != "float32")
    assert found.noise < 1e-6 or dtype != "float32"


def stepped(start: Adapter, seed: int) -> Adapter:
    step = make_adapter(seed, SHAPES, 3, 1.0)
    return Adapter(
        {n: Factors(f.a + step[n].a / 10, f.b + step[n].b / 10, f.scale) for n, f in start.items()}
    )


def received(sent: Broadcast, name: str, known: Adapter) -> Deltas:
    return dense_deltas(unpack(from_record(sent.records[name]), known))


@pytest.mark.parametrize("receives", ["both", "A", "B"])
@pytest.mark.parametrize("dtype", HOW_FAR)
def test_the_error_of_a_broadcast_is_that_of_dense_matrices(dtype: str, receives: str) -> None:
    model = GlobalModel(merged=MERGED, start=START)
    sent = broadcast(model, dtype, receives)
    whole = add(dense_deltas(MERGED), dense_deltas(START))
    came = add(received(sent, "merged", MERGED), received(sent, "start", START))
    low, high = HOW_FAR[dtype]
    found = broadcast_error(model, sent)
    assert found == pytest.approx(distance(whole, came) / frobenius(whole), rel=1e-3)
    assert low < found < high


def test_a_broadcast_without_rounding_or_without_a_delta_has_no_error() -> None:
    model = GlobalModel(merged=MERGED, start=START)
    assert broadcast_error(model, broadcast(model, "float32")) == 0.0
    assert broadcast_error(GlobalModel(), broadcast(GlobalModel(), "int8")) == 0.0
    fresh = GlobalModel(start=make_adapter(3, SHAPES, 2, kind="B zero"))
    assert broadcast_error(fresh, broadcast(fresh, "int8")) == 0.0


def test_the_log_holds_what_rounding_cost_on_both_ways(tmp_path: Path) -> None:
    def told(client: int, message: Message, reply: Message) -> Message:
        if "adapter" in reply.content and client:
            reply.content["metrics"]["wire-error"] = 0.001 * client  # type: ignore[index]
        elif "adapter" in reply.content:  # an older client does not say
            del reply.content["metrics"]["wire-error"]  # type: ignore[attr-defined]
        return reply

    folder = play(tmp_path / "run", "int8", "flora-warm", app=fake_app(tamper=told))
    first, second, third = RunFolder(folder).rounds()[1:]
    for record in (first, second, third):
        assert [client["wire_error"] for client in record["clients"]] == [0.0, 0.001, 0.002]
    assert first["broadcast_error"] == 0.0  # nothing has been sent yet
    assert 0.0 < second["broadcast_error"] < 0.03
    assert 0.0 < third["broadcast_error"] < 0.03
    exact = RunFolder(play(tmp_path / "exact", "float32", "flora-warm")).rounds()[1:]
    assert [record["broadcast_error"] for record in exact] == [0.0, 0.0, 0.0]


def test_int8_takes_fewer_bytes_both_ways() -> None:
    large = make_adapter(4, {"q": (512, 512)}, 32)
    model = GlobalModel(merged=large)
    assert broadcast(model, "int8").num_bytes < 0.26 * len(pack(large))
