"""What is wrong in run, site or message becomes a failure record, never a traceback."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from models.tuned_model import TunedModel
from tests.adapter_generators import make_adapter
from tests.client.app_messages import NODE, Config, context, instruct, send
from tools.rehearsal.tiny_models import CONTEXT
from wire.records import to_record

pytestmark = pytest.mark.usefixtures("fresh_process")


def failure(content: RecordDict) -> dict[str, Any]:
    """The one record of a reply that says no."""
    assert list(content) == ["failure"]
    record = dict(content["failure"])
    assert list(record) == ["reason", "client"]
    return record


def test_another_base_is_refused_with_both_named(config: Config, tuned: TunedModel) -> None:
    for kind in ("train", "evaluate"):
        no = failure(send(kind, instruct(config, "0123456789abcdef"), context(config, 1)))
        assert no["client"] == "client-01"
        assert no["reason"].startswith(
            f"the run's base model is 0123456789abcdef, but this site's is {tuned.base.identity}:"
        )


@pytest.mark.parametrize(
    ("run", "site", "reason"),
    [
        ({"local.epoch": 2}, {}, "unknown configuration key 'local.epoch'; the nearest known key"),
        ({"rounds": 0}, {}, "rounds must be a whole number, at least 1; got 0"),
        ({"data.path": "/nowhere.jsonl"}, {}, "data.path names '/nowhere.jsonl', where there is"),
        ({"model.path": "/nowhere"}, {}, "model.path names '/nowhere', where there is no folder"),
        ({"lora.target-modules": "q_porj"}, {}, "lora.target-modules: 'q_porj' matches no linear"),
        ({}, {"partition_id": 3}, "partition-id 3 does not exist among 3 parts"),
        ({}, {"rank": 13}, "rank 13 is more than module model.layers.0.self_attn.k_proj"),
        ({}, {"data_path": "/nowhere.csv"}, "data-path names '/nowhere.csv', where there is no"),
        ({"data.context": CONTEXT + 1}, {}, "data.context is 65 tokens, but "),
        ({}, {"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N; got 'gpu'"),
    ],
)
def test_what_is_wrong_in_run_or_site_becomes_a_failure(
    run: Config, site: Config, reason: str, config: Config
) -> None:
    content = send("query", RecordDict({"ask": ConfigRecord()}), context(config | run, **site))
    assert failure(content)["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("site", "reason", "client"),
    [
        (
            {"rnk": 3},
            "unknown configuration key 'rnk'; the nearest known key is rank",
            f"node {NODE}",
        ),
        ({"rank": 0, "name": "oslo"}, "the site's rank must be a whole number of at l", "oslo"),
        ({"num_partitions": "ten"}, "num-partitions must be a whole number", f"node {NODE}"),
    ],
)
def test_a_bad_node_config_is_a_failure_too(
    site: Config, reason: str, client: str, config: Config
) -> None:
    no = failure(send("query", RecordDict({"ask": ConfigRecord()}), context(config, **site)))
    assert no["reason"].startswith(reason)
    assert no["client"] == client


DIVERGING = {"local.learning-rate": 1e30, "local.max-grad-norm": 0.0, "local.warmup": 0.0}


def tell(values: Config) -> Callable[[RecordDict], object]:
    return lambda content: content["instruction"].update(values)


def drop(name: str) -> Callable[[RecordDict], object]:
    return lambda content: content["instruction"].pop(name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tell({"lora.foo": 1}), "unknown configuration key 'lora.foo'"),
        (tell({"local.epochs": 0}), "local.epochs must be a whole number, at least 1; got 0"),
        (tell(DIVERGING), "the training loss became "),
        (drop("local.epochs"), "configuration key local.epochs is missing"),
        (drop("wire-dtype"), "the server's message lacks 'wire-dtype': server and site need the"),
        (lambda c: c.pop("instruction"), "the server's message lacks 'instruction'"),
        (lambda c: c.update({"start": to_record(b"no adapter")}), "the header claims "),
    ],
    ids=["key", "value", "diverging", "missing", "version", "empty", "damaged"],
)
def test_what_is_wrong_in_the_message_becomes_a_failure(
    change: Callable[[RecordDict], object], reason: str, config: Config, tuned: TunedModel
) -> None:
    message = instruct(config, tuned.base.identity)
    change(message)
    no = failure(send("train", message, context(config, client=2)))
    assert no["client"] == "client-02"
    assert no["reason"].startswith(reason)


@pytest.mark.parametrize("part", ["merged", "start"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_global_model_over_other_modules_is_refused(
    part: str, kind: str, config: Config, tuned: TunedModel
) -> None:
    shapes = dict(tuned.shapes)
    name, (m, n) = shapes.popitem()
    for other in (shapes, {**shapes, name: (m + 1, n)}):
        adapter = make_adapter(0, other, rank=2)
        message = instruct(config, tuned.base.identity, **{part: adapter})  # type: ignore[arg-type]
        no = failure(send(kind, message, context(config)))
        assert no["reason"].startswith(f"the run's {part} does not fit lora.target-modules: it dif")
        assert name in no["reason"]


def test_a_client_that_holds_out_nothing_cannot_evaluate(config: Config, tuned: TunedModel) -> None:
    run = config | {"data.client-held-out": 0.0}
    no = failure(send("evaluate", instruct(run, tuned.base.identity), context(run, client=1)))
    assert no["reason"] == (
        "client-01 holds out no examples: raise data.client-held-out, or name a test set with "
        "evaluation-path"
    )
