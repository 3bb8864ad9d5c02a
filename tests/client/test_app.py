"""The ClientApp through Flower's own messages answers with the documented records."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from adapters.adapter import Adapter
from adapters.algebra import beyond, stack, truncate
from client.starting import starting_factors
from client.training import train
from models import tuned_model
from models.tuned_model import TunedModel
from settings.run import RunSettings, run_settings
from tasks.partition import federate
from tests.adapter_generators import make_adapter
from tests.client.app_messages import CLIENTS, ROUND, SEED, Config, context, instruct, send, write
from tests.dense_oracle import dense_deltas, distance, frobenius
from tools.rehearsal.tiny_models import open_model
from wire.codec import pack, unpack
from wire.records import PIECE, from_record, to_record

pytestmark = pytest.mark.usefixtures("fresh_process")


def by_hand(
    tuned: TunedModel, settings: RunSettings, client: int, start: Adapter | None = None
) -> tuple[Adapter, int]:
    """The round of one client, without messages."""
    part = federate(settings.data, CLIENTS, settings.seed).parts[client]
    examples = tuned.encode(part.train, settings.data).examples
    rank = settings.lora.rank_of(client)
    own = starting_factors(start, tuned.shapes, rank, settings.lora.scale_of(rank), SEED)
    return train(tuned, examples, own, settings.local, SEED).adapter, len(examples)


def stamp(config: Config, tuned: TunedModel) -> dict[str, Any]:
    """What a reply says that it belongs to."""
    data = federate(run_settings(config).data, CLIENTS, 0).parts[0].fingerprint
    return {"round": ROUND, "base": tuned.base.identity, "data": data}


def same_bytes(x: Adapter, y: Adapter) -> bool:
    return pack(x) == pack(y)


def test_a_query_tells_who_is_there_and_what_it_would_train(
    config: Config, tuned: TunedModel
) -> None:
    content = send("query", RecordDict({"ask": ConfigRecord()}), context(config, client=1))
    assert list(content) == ["site"]
    site = dict(content["site"])
    part = federate(run_settings(config).data, CLIENTS, 0).parts[1]
    assert site == {
        "client": "client-01",
        "number": 1,
        "rank": 3,
        "base": tuned.base.identity,
        "data": part.fingerprint,
        "chat-template": "",
        "num-examples": len(part.train),
        "modules": list(tuned.shapes),
        "rows": [m for m, _ in tuned.shapes.values()],
        "columns": [n for _, n in tuned.shapes.values()],
        "head": [],
        "head-shapes": [],
        "labels": [],
    }


def test_a_trained_adapter_comes_back_with_its_metrics(config: Config, tuned: TunedModel) -> None:
    content = send("train", instruct(config, tuned.base.identity), context(config, client=2))
    assert list(content) == ["reply", "adapter", "metrics"]
    wanted, count = by_hand(tuned, run_settings(config), client=2)
    assert same_bytes(unpack(from_record(content["adapter"])), wanted)
    assert wanted.rank == 4
    assert dict(content["reply"]) == stamp(config, tuned)
    metrics = content["metrics"]
    assert isinstance(metrics, MetricRecord)
    assert list(metrics) == [
        *("num-examples", "loss", "tokens", "steps", "seconds", "peak-bytes", "examples-seen"),
        "wire-error",
    ]
    assert (metrics["num-examples"], metrics["steps"]) == (count, -(-count // 4))
    assert metrics["examples-seen"] == count  # one epoch
    assert all(float(str(value)) >= 0 for value in metrics.values())


def test_it_trains_from_the_start_over_the_merged_base(config: Config, tuned: TunedModel) -> None:
    merged = make_adapter(1, tuned.shapes, rank=5, scale=0.05)
    start = make_adapter(2, tuned.shapes, rank=3, scale=0.05)
    message = instruct(config, tuned.base.identity, merged, start)
    content = send("train", message, context(config, client=0))
    tuned.merge(merged)
    wanted, _ = by_hand(tuned, run_settings(config), client=0, start=start)
    assert same_bytes(unpack(from_record(content["adapter"])), wanted)


def test_the_adapter_travels_in_the_format_asked_for(config: Config, tuned: TunedModel) -> None:
    came, errors = {}, {}
    for dtype in ("float32", "bfloat16", "int8"):
        message = instruct(config, tuned.base.identity, wire_dtype=dtype)
        content = send("train", message, context(config))
        came[dtype], errors[dtype] = from_record(content["adapter"]), content["metrics"]
    exact = unpack(came["float32"])
    saved = len(came["float32"]) - len(came["bfloat16"])
    assert saved == pytest.approx(2 * exact.num_parameters, abs=200)
    whole = dense_deltas(exact)
    for dtype, packed in came.items():
        error = distance(whole, dense_deltas(unpack(packed))) / frobenius(whole)
        assert errors[dtype]["wire-error"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert errors["int8"]["wire-error"] > errors["float32"]["wire-error"] == 0.0


def test_the_message_decides_shape_and_training_not_the_run(
    config: Config, tuned: TunedModel
) -> None:
    start = make_adapter(2, tuned.shapes, rank=3, scale=0.05)
    told = instruct(
        config,
        tuned.base.identity,
        start=start,
        rule__trains="B",
        local__max_steps=1,
        lora__rank="6",
        lora__alpha="3",
        lora__dropout=0.3,
    )
    content = send("train", told, context(config))
    settings = run_settings(config | {"local.max-steps": 1})
    part = federate(settings.data, CLIENTS, settings.seed).parts[0]
    examples = tuned.encode(part.train, settings.data).examples
    own = starting_factors(start, tuned.shapes, 6, 0.5, SEED)
    wanted = train(tuned, examples, own, settings.local, SEED, "B", dropout=0.3).adapter
    assert same_bytes(unpack(from_record(content["adapter"])), wanted)
    assert all(np.array_equal(wanted[name].a, own[name].a) for name in own)
    assert content["metrics"]["steps"] == 1


def test_evaluation_is_on_what_the_client_holds_out(config: Config, tuned: TunedModel) -> None:
    merged = make_adapter(1, tuned.shapes, rank=5, scale=0.05)
    start = make_adapter(2, tuned.shapes, rank=7, scale=0.05)
    message = instruct(config, tuned.base.identity, merged, start)
    content = send("evaluate", message, context(config, client=1))
    settings = run_settings(config)
    held_out = federate(settings.data, CLIENTS, 0).parts[1].held_out
    examples = tuned.encode(held_out, settings.data).examples
    own = starting_factors(start, tuned.shapes, 3, settings.lora.scale_of(3), SEED)
    assert own.rank < start.rank
    wanted = tuned.evaluate_global(merged, own, examples)
    assert list(content) == ["reply", "metrics"]
    assert dict(content["reply"]) == stamp(config, tuned)
    assert dict(content["metrics"]) == {
        "num-examples": len(held_out),
        "loss": wanted.loss,
        "tokens": wanted.tokens,
    }


def test_who_answered_before_leaves_no_trace(config: Config, tuned: TunedModel) -> None:
    base = tuned.base.identity
    start = make_adapter(2, tuned.shapes, rank=3, scale=0.05)

    def answer(client: int, merged: Adapter | None = None) -> bytes:
        message = instruct(config, base, merged, start, lora__dropout=0.2)
        return from_record(send("train", message, context(config, client))["adapter"])

    alone = answer(2)
    tuned_model._resident.cache_clear()
    answer(1)
    send("query", RecordDict({"ask": ConfigRecord()}), context(config, 0))
    merged = make_adapter(1, tuned.shapes, rank=5, scale=0.05)
    send("evaluate", instruct(config, base, merged), context(config, 0))
    answer(0, merged)
    assert answer(2) == alone


def test_the_sites_own_values_win(config: Config, gpt2_folder: Path, tmp_path: Path) -> None:
    own = write(tmp_path / "own.jsonl", 20, word="own")
    there = context(
        config | {"model.device": "no such device"},
        name="oslo",
        rank=5,
        data_path=own,
        model_path=str(gpt2_folder),
        device="cpu",
    )
    site = dict(send("query", RecordDict({"ask": ConfigRecord()}), there)["site"])
    gpt2 = open_model(gpt2_folder)
    assert (site["client"], site["rank"], site["num-examples"]) == ("oslo", 5, 18)
    assert (site["base"], site["modules"]) == (gpt2.base.identity, list(gpt2.shapes))
    adapter = send("train", instruct(config, gpt2.base.identity), there)["adapter"]
    assert unpack(from_record(adapter)).rank == 5


def test_a_site_with_a_cache_says_what_it_holds_and_trains_from_it(
    config: Config, tuned: TunedModel, tmp_path: Path
) -> None:
    whole = make_adapter(3, tuned.shapes, 4, 0.02)
    parts = [truncate(whole, 2), beyond(whole, 2)]
    versions = [hashlib.sha256(pack(part)).hexdigest()[:32] for part in parts]
    records = [{PIECE + v: to_record(pack(p))} for v, p in zip(versions, parts, strict=True)]
    here = context(config, cache_path=str(tmp_path / "cache"))
    asked = send("query", RecordDict({"ask": ConfigRecord()}), here)
    assert asked["site"]["holds"] == []  # type: ignore[index, call-overload]

    def told(pieces: list[str], *carried: dict[str, ArrayRecord]) -> RecordDict:
        content = instruct(config, tuned.base.identity)
        instruction = content.config_records["instruction"]
        instruction["pieces"] = pieces
        instruction["piece-kinds"] = ["plus"] * len(pieces)
        instruction["start-piece"] = ""
        for each in carried:
            for name, record in each.items():
                content[name] = record
        return content

    send("train", told(versions[:1], records[0]), here)
    content = send("train", told(versions, records[1]), here)
    assert content["reply"]["holds"] == sorted(versions)  # type: ignore[index, call-overload]
    plain = instruct(config, tuned.base.identity, merged=stack(parts, [1.0, 1.0]))
    expected = send("train", plain, context(config))
    assert from_record(content["adapter"]) == from_record(expected["adapter"])
    lost = send("train", told([*versions, "f" * 32]), here)
    assert "lacks 1 of 3 pieces" in str(lost["failure"]["reason"])  # type: ignore[index, call-overload]
    assert lost["failure"]["holds"] == sorted(versions)  # type: ignore[index, call-overload]


def test_a_site_logs_what_it_did_and_a_simulated_client_does_not(
    config: Config, tuned: TunedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bouquet")
    message = instruct(config, tuned.base.identity)
    send("train", message, context(config))
    assert not caplog.records
    send("train", message, context(config, name="oslo"))
    (line,) = [record.message for record in caplog.records]
    start = f"event=trained round={ROUND} version={'0' * 16} node=41 client=oslo rank=2 examples="
    assert line.startswith(start)


def test_a_sites_test_set_is_what_it_evaluates_on(
    config: Config, tuned: TunedModel, tmp_path: Path
) -> None:
    own, test = (write(tmp_path / f"{n}.jsonl", n_rows, n) for n, n_rows in (("own", 20), ("t", 3)))
    there = context(config, name="oslo", data_path=own, evaluation_path=test)
    site = send("query", RecordDict({"ask": ConfigRecord()}), there)["site"]
    plain = context(config, name="oslo", data_path=own)
    other = send("query", RecordDict({"ask": ConfigRecord()}), plain)["site"]
    assert site["num-examples"] == 20  # type: ignore[index, call-overload]
    assert site["data"] != other["data"]  # type: ignore[index, call-overload]
    content = send("evaluate", instruct(config, tuned.base.identity), there)
    assert content["metrics"]["num-examples"] == 3


def test_a_site_with_one_example_trains_on_it_and_says_why_it_evaluates_nothing(
    config: Config, tuned: TunedModel, tmp_path: Path
) -> None:
    one = write(tmp_path / "one.jsonl", 1)
    there = context(config, name="oslo", data_path=one)
    refused = send("train", instruct(config, tuned.base.identity), there)["failure"]
    assert str(refused["reason"]).startswith(  # type: ignore[index, call-overload]
        "oslo has 1 training example, and of fewer than 10 an adapter would be their record"
    )
    there = context({**config, "clients.min-examples": 1}, name="oslo", data_path=one)
    content = send("train", instruct(config, tuned.base.identity), there)
    assert content["metrics"]["num-examples"] == 1
    failure = send("evaluate", instruct(config, tuned.base.identity), there)["failure"]
    expected = "oslo holds out no examples: it has one only, and trains on it"
    assert failure["reason"] == expected  # type: ignore[index, call-overload]
