"""What holds clients together, FedProx's pull and SCAFFOLD's correction, by plain arithmetic."""

import numpy as np
import pytest
import torch

from adapters.adapter import Adapter, Factors, draw
from adapters.algebra import norm
from client.drift import ControlVariates, Proximal
from client.kept import as_own_control, own_control
from models.tuned_model import TunedModel
from tests.client.app_messages import Config, context, instruct, send
from wire.codec import pack, unpack
from wire.records import from_record, to_record

SHAPES = {"q": (4, 6), "v": (3, 6)}
pytestmark = pytest.mark.usefixtures("fresh_process")


def parameters(seed: int) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    rng = np.random.default_rng(seed)
    return {
        name: (
            torch.nn.Parameter(torch.from_numpy(rng.standard_normal((2, n)).astype(np.float32))),
            torch.nn.Parameter(torch.from_numpy(rng.standard_normal((m, 2)).astype(np.float32))),
        )
        for name, (m, n) in SHAPES.items()
    }


def control(seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            name: Factors(
                rng.standard_normal((2, n)).astype(np.float32),
                rng.standard_normal((m, 2)).astype(np.float32),
                1.0,
            )
            for name, (m, n) in SHAPES.items()
        }
    )


def test_the_pull_is_half_the_squared_distance_and_its_gradient_the_distance() -> None:
    pairs = parameters(1)
    pull = Proximal(0.3)
    factors = list(pairs.values())
    assert float(pull(factors).detach()) == 0.0
    steps = {}
    with torch.no_grad():
        for place, factor in enumerate(f for pair in factors for f in pair):
            steps[place] = np.full(factor.shape, 0.1 * (place + 1))
            factor += torch.from_numpy(steps[place]).float()
    value = pull(factors)
    assert float(value.detach()) == pytest.approx(
        0.15 * sum((s**2).sum() for s in steps.values()), rel=1e-5
    )
    value.backward()  # type: ignore[no-untyped-call]
    for place, factor in enumerate(f for pair in factors for f in pair):
        assert factor.grad is not None
        assert np.allclose(factor.grad.numpy(), 0.3 * steps[place], atol=1e-6)


@pytest.mark.parametrize("server", [None, control(5)], ids=["no c", "c"])
@pytest.mark.parametrize("own", [None, control(6)], ids=["no c_k", "c_k"])
def test_a_gradient_is_corrected_by_both_variates_and_remembered_as_it_was(
    server: Adapter | None, own: Adapter | None
) -> None:
    pairs, correct = parameters(2), ControlVariates(server, own)
    rng, raw = np.random.default_rng(3), []
    for _ in range(3):
        gradients = {
            n: [rng.standard_normal(tuple(p.shape)) for p in pair] for n, pair in pairs.items()
        }
        raw.append(gradients)
        for name, pair in pairs.items():
            for place, parameter in enumerate(pair):
                parameter.grad = torch.from_numpy(gradients[name][place]).float()
        correct(pairs)
        for name, pair in pairs.items():
            for place, parameter in enumerate(pair):
                wanted = gradients[name][place].copy()
                wanted += 0 if server is None else (server[name].a, server[name].b)[place]
                wanted -= 0 if own is None else (own[name].a, own[name].b)[place]
                assert parameter.grad is not None
                assert np.allclose(parameter.grad.numpy(), wanted, atol=1e-5)
    found = correct.mean()
    for name in SHAPES:
        for place, values in enumerate((found[name].a, found[name].b)):
            assert np.allclose(values, sum(g[name][place] for g in raw) / 3, atol=1e-6)


def test_a_control_variate_is_kept_as_it_is_and_none_of_another_rank_taken() -> None:
    mine = control(7)
    kept = {**as_own_control(mine), "q": np.ones(3, np.float32)}
    found = own_control(kept, SHAPES, 2)
    assert found is not None
    for name in SHAPES:
        assert found[name].a.tobytes() == mine[name].a.tobytes()
        assert found[name].b.tobytes() == mine[name].b.tobytes()
    assert own_control(kept, SHAPES, 3) is None
    assert own_control({}, SHAPES, 2) is None


def steps_of(content: object) -> Adapter:
    return unpack(from_record(content))


def apart(one: Adapter, other: Adapter) -> float:
    return norm(
        Adapter({n: Factors(f.a - other[n].a, f.b - other[n].b, 1.0) for n, f in one.items()})
    ) + float(sum(np.abs(f.a - other[n].a).sum() for n, f in one.items()))


def test_a_strong_pull_keeps_a_client_near_its_start(config: Config, tuned: TunedModel) -> None:
    start = draw(tuned.shapes, 4, 9, 4.0)
    sent = []
    for mu in (0.0, 1.0, 100.0):
        message = instruct(config, tuned.base.identity, start=start, rule__proximal=mu)
        sent.append(steps_of(send("train", message, context(config, client=2))["adapter"]))
    near = [apart(adapter, start) for adapter in sent]
    assert near[0] > near[1] > near[2] > 0.0


def test_a_client_sends_how_its_control_variate_changed_and_goes_on_from_it(
    config: Config, tuned: TunedModel
) -> None:
    start, place = draw(tuned.shapes, 4, 9, 4.0), context(config, client=2)
    ask = instruct(config, tuned.base.identity, start=start, rule__control=True, round=1)
    first = steps_of(send("train", ask, place)["control"])
    # With neither variate the gradients are plain ones, and training is as without.
    plain = instruct(config, tuned.base.identity, start=start, round=1)
    without = send("train", plain, context(config, client=2))
    again = send("train", ask, context(config, client=2))
    assert from_record(without["adapter"]) == from_record(again["adapter"])
    assert "control" not in without
    # In the next round it sends the difference to what it kept, and the server's turns its way.
    ask = instruct(config, tuned.base.identity, start=start, rule__control=True, round=2)
    second = send("train", ask, place)
    change = steps_of(second["control"])
    fresh = send("train", ask, context(config, client=2))
    whole = steps_of(fresh["control"])
    assert from_record(second["adapter"]) != from_record(fresh["adapter"])
    assert {n: f.shape for n, f in change.items()} == {n: f.shape for n, f in first.items()}
    assert max(float(np.abs(f.a).max()) for f in whole.values()) > 0.0
    # A server's variate equal to its own undoes the correction.
    ask["control"] = to_record(pack(first))
    cancelled = send("train", ask, place)
    assert from_record(cancelled["adapter"]) == from_record(fresh["adapter"])
