"""What a method may ask of a client beyond plain training, each against the same done by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from adapters.adapter import Adapter, Delta, Factors, draw
from adapters.algebra import add, beyond, truncate
from client.kept import recall
from client.pruning import RestPenalty
from client.shelf import RecordShelf
from client.starting import starting_factors
from client.training import Trained, _read_moments, _restore_moments, train
from core.errors import AdapterError
from models.tuned_model import TunedModel
from settings.run import run_settings
from tests.adapter_generators import make_adapter
from tests.client.app_messages import ROUND, SEED, Config, context, instruct, send
from wire.codec import pack, unpack
from wire.records import from_record, to_record

pytestmark = pytest.mark.usefixtures("fresh_process")
CLIENT, RANK = 1, 3


def by_hand(
    tuned: TunedModel, config: Config, begin: Adapter, merged: Delta | None = None, **over: Any
) -> Trained:
    """Client 1's round from these factors."""
    from tasks.partition import federate

    settings = run_settings(config)
    part = federate(settings.data, 3, settings.seed).parts[CLIENT]
    examples = tuned.encode(part.train, settings.data).examples
    tuned.merge(merged)
    return train(tuned, examples, begin, settings.local, SEED, **over)


def began(tuned: TunedModel, config: Config, start: Adapter | None) -> Adapter:
    scale = run_settings(config).lora.scale_of(RANK)
    return starting_factors(start, tuned.shapes, RANK, scale, SEED)


def reply(to: Context, message: RecordDict, known: Adapter | None = None) -> Adapter:
    return unpack(from_record(send("train", message, to)["adapter"]), known)


def same(x: Adapter, y: Adapter) -> bool:
    return pack(x) == pack(y)


@pytest.mark.parametrize("merged_rank", [None, 5])
def test_a_frozen_tail_is_part_of_the_model_and_does_not_come_back(
    config: Config, tuned: TunedModel, merged_rank: int | None
) -> None:
    start = make_adapter(2, tuned.shapes, rank=6, scale=0.05)
    merged = make_adapter(1, tuned.shapes, merged_rank, scale=0.05) if merged_rank else None
    message = instruct(config, tuned.base.identity, merged, start, rule__freezes_tail=True)
    found = reply(context(config, CLIENT), message)
    tail = beyond(start, RANK)
    whole = add([merged, tail], [1.0, 1.0]) if merged else tail
    wanted = by_hand(tuned, config, began(tuned, config, start), whole).adapter
    assert same(found, wanted)
    dropped = reply(context(config, CLIENT), instruct(config, tuned.base.identity, merged, start))
    assert not same(found, dropped)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_does_not_travel_is_what_the_server_knows(
    config: Config, tuned: TunedModel, factor: str
) -> None:
    start = make_adapter(2, tuned.shapes, rank=RANK, scale=0.05)
    rule = {"rule__trains": factor, "rule__sends": factor}
    message = instruct(config, tuned.base.identity, start=start, **rule)
    content = send("train", message, context(config, CLIENT))
    packed = from_record(content["adapter"])
    with pytest.raises(AdapterError, match="both lora_A and lora_B"):
        unpack(packed)
    wanted = by_hand(tuned, config, began(tuned, config, start), trains=factor).adapter
    found = unpack(packed, truncate(start, RANK))
    for name, f in wanted.items():
        assert np.array_equal(found[name].a, f.a)
        assert np.allclose(found[name].b, f.b, rtol=1e-6, atol=0)


def test_a_factor_of_the_start_that_did_not_travel_comes_from_the_runs_seed(
    config: Config, tuned: TunedModel
) -> None:
    start = make_adapter(2, tuned.shapes, rank=RANK, scale=0.05)
    message = instruct(config, tuned.base.identity, rule__receives="B", start_seed=77)
    message["start"] = to_record(pack(start, factors="B"))
    found = reply(context(config, CLIENT), message)
    drawn = draw(tuned.shapes, RANK, 77, 1.0)
    whole = Adapter({n: Factors(drawn[n].a, f.b, f.scale) for n, f in start.items()})
    assert same(found, by_hand(tuned, config, began(tuned, config, whole)).adapter)


def own_b(kept: Mapping[str, Any], adapter: Adapter) -> Adapter:
    return Adapter({n: Factors(f.a, kept[n], f.scale) for n, f in adapter.items()})


def test_a_client_goes_on_with_its_own_b_and_never_sends_it(
    config: Config, tuned: TunedModel
) -> None:
    shared = draw(tuned.shapes, RANK, 5, 1.0)
    rule = {"rule__sends": "A", "rule__receives": "A", "rule__keeps_b": True}
    here = context(config, CLIENT)

    def message(server_round: int, start: Adapter) -> RecordDict:
        told = instruct(config, tuned.base.identity, round=server_round, **rule)
        told["start"] = to_record(pack(start, factors="A"))
        return told

    send("train", message(ROUND, shared), here)
    first = by_hand(tuned, config, began(tuned, config, shared)).adapter
    kept = recall(RecordShelf(here.state), ROUND)
    assert all(np.array_equal(kept[name], f.b) for name, f in first.items())

    averaged = draw(tuned.shapes, RANK, 6, 1.0)
    content = send("train", message(ROUND + 1, averaged), here)
    begin = own_b(kept, began(tuned, config, averaged))
    second = by_hand(tuned, config, begin).adapter
    found = unpack(from_record(content["adapter"]), averaged)
    assert all(np.array_equal(found[name].a, f.a) for name, f in second.items())
    assert all(not f.b.any() for f in found.values())  # the server has zeros in its place

    again = send("train", message(ROUND + 1, averaged), here)  # a torn round, played again
    assert from_record(again["adapter"]) == from_record(content["adapter"])

    asked = send("evaluate", message(ROUND + 1, averaged), here)["metrics"]
    stranger = send("evaluate", message(ROUND + 1, averaged), context(config, CLIENT))["metrics"]
    assert asked["loss"] != stranger["loss"]  # a site that is new has B = 0
    assert asked["loss"] < stranger["loss"]


def test_a_kept_optimizer_goes_on_with_its_moments(config: Config, tuned: TunedModel) -> None:
    start = make_adapter(2, tuned.shapes, rank=RANK, scale=0.05)
    here = context(config, CLIENT)

    def message(server_round: int) -> RecordDict:
        kept = {"round": server_round, "start.optimizer": "kept"}
        return instruct(config, tuned.base.identity, start=start, **kept)

    first = reply(here, message(ROUND))
    by_hand_first = by_hand(tuned, config, began(tuned, config, start), moments={})
    assert same(first, by_hand_first.adapter)
    second = reply(here, message(ROUND + 1))
    moments = by_hand_first.moments
    wanted = by_hand(tuned, config, began(tuned, config, start), moments=moments)
    assert same(second, wanted.adapter)
    assert not same(first, second)


def test_two_halves_with_kept_moments_are_one_whole() -> None:
    def steps(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            (parameter**4).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    values = torch.linspace(-1, 1, 6).reshape(2, 3)
    whole = torch.nn.Parameter(values.clone())
    steps(whole, torch.optim.AdamW([whole], lr=0.1, weight_decay=0.0), 7)
    half = torch.nn.Parameter(values.clone())
    first = torch.optim.AdamW([half], lr=0.1, weight_decay=0.0)
    steps(half, first, 3)
    second = torch.optim.AdamW([half], lr=0.1, weight_decay=0.0)
    _restore_moments(second, [half], _read_moments(first, [half]))
    steps(half, second, 4)
    assert torch.equal(half, whole)


def test_moments_of_another_shape_are_left_out() -> None:
    old, new = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(1, 3))
    optimizer = torch.optim.AdamW([old])
    old.sum().backward()
    optimizer.step()
    fresh = torch.optim.AdamW([new])
    _restore_moments(fresh, [new], _read_moments(optimizer, [old]))
    assert not fresh.state


def test_a_client_told_to_train_less_than_its_rank_does(config: Config, tuned: TunedModel) -> None:
    start = make_adapter(2, tuned.shapes, rank=4, scale=0.05)
    message = instruct(config, tuned.base.identity, start=start, rule__rank=2)
    assert reply(context(config, CLIENT), message).rank == 2


@pytest.mark.parametrize(("penalty", "rank"), [(50.0, 2), (0.0, RANK)])
def test_a_client_prunes_what_the_penalty_shrank(
    config: Config, tuned: TunedModel, penalty: float, rank: int
) -> None:
    start = make_adapter(2, tuned.shapes, rank=RANK, scale=0.05)
    rule = {"rule__prune": 0.7, "rule__penalty": penalty}
    message = instruct(config, tuned.base.identity, start=start, **rule)
    found = reply(context(config, CLIENT), message)
    begin = began(tuned, config, start)
    wanted = by_hand(tuned, config, begin, penalties=[RestPenalty(penalty, 2)]).adapter
    assert same(found, truncate(wanted, rank))
