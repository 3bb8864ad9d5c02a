"""How many steps a round takes, at which rates and in which arithmetic."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from client.training import _groups, computes_in_bfloat16, learning_rate, plan_steps
from settings.keys import Value
from settings.run import LocalSettings, run_settings
from tasks.encoding import Encoded
from tests.adapter_generators import QUICK

PEAK = 0.01


def local(**values: Value) -> LocalSettings:
    """Local settings for whole epochs; `batch_size=4` sets local.batch-size."""
    layer = {f"local.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"local.learning-rate": PEAK, "local.max-steps": 0}, layer).local


def rates(steps: int, settings: LocalSettings) -> list[float]:
    return [learning_rate(step, steps, settings) for step in range(steps)]


def library_rates(steps: int, warm: int, schedule: str) -> list[float]:
    """The same schedule as transformers has it, which starts its warm-up from a rate of 0."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = transformers.get_scheduler(
        schedule if schedule != "constant" else "constant_with_warmup", optimizer, warm, steps
    )
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup", "warm"), [(20, 0.25, 5), (9, 0.0, 0), (7, 0.3, 2)])
def test_after_warm_up_the_rates_are_those_of_transformers(
    schedule: str, steps: int, warmup: float, warm: int
) -> None:
    found = rates(steps, local(schedule=schedule, warmup=warmup))
    assert found[warm:] == pytest.approx(library_rates(steps, warm, schedule)[warm:], rel=1e-9)
    assert found[:warm] == pytest.approx([PEAK * (i + 1) / warm for i in range(warm)])


@QUICK
@given(
    st.integers(1, 60),
    st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]),
    st.sampled_from(["cosine", "linear", "constant"]),
)
def test_rates_rise_to_the_peak_and_never_again_and_stay_above_zero(
    steps: int, warmup: float, schedule: str
) -> None:
    found = rates(steps, local(schedule=schedule, warmup=warmup))
    top = found.index(max(found))
    assert max(found) == pytest.approx(PEAK)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found) > 0.0


def test_a_round_of_one_step_takes_the_peak() -> None:
    for warmup in (0.0, 0.5, 1.0):
        assert rates(1, local(warmup=warmup)) == [PEAK]


@pytest.mark.parametrize(
    ("examples", "values", "steps"),
    [
        (16, {}, 1),
        (17, {}, 2),
        (1, {}, 1),
        (100, {"epochs": 3}, 21),
        (100, {"accumulation": 2}, 4),
        (100, {"accumulation": 2, "epochs": 3}, 12),  # an epoch's last step may be smaller
        (100, {"epochs": 3, "max_steps": 5}, 5),
        (100, {"max_steps": 50}, 7),
        (10, {"accumulation": 64}, 1),
    ],
)
def test_a_round_is_its_epochs_but_at_most_max_steps(
    examples: int, values: dict[str, Value], steps: int
) -> None:
    assert plan_steps(examples, local(batch_size=16, **values)) == steps


@QUICK
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_there_are_as_many_groups_of_batches_as_steps_and_each_epoch_holds_all(
    count: int, batch_size: int, accumulation: int, epochs: int
) -> None:
    settings = local(batch_size=batch_size, accumulation=accumulation, epochs=epochs)
    examples = [Encoded(torch.arange(2 + i % 5).numpy(), 1) for i in range(count)]
    groups = list(_groups(examples, settings, seed=3))
    assert len(groups) == plan_steps(count, settings)
    assert max(map(len, groups)) <= accumulation
    seen = [index for group in groups for batch in group for index in batch]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_in_order() -> None:
    examples = [Encoded(torch.arange(5).numpy(), 1) for _ in range(32)]
    groups = list(_groups(examples, local(batch_size=4, epochs=2), seed=0))
    assert groups[:8] != groups[8:]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_precision_is_as_told(device: str) -> None:
    assert computes_in_bfloat16("bfloat16", torch.device(device))
    assert not computes_in_bfloat16("float32", torch.device(device))


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bfloat16_where_the_hardware_has_it(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu(including_emulation: bool) -> bool:
        assert not including_emulation
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", on_gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    assert computes_in_bfloat16("auto", torch.device("cuda")) is supported
    assert computes_in_bfloat16("auto", torch.device("cpu")) is supported
    assert not computes_in_bfloat16("auto", torch.device("mps"))
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert not computes_in_bfloat16("auto", torch.device("cpu"))  # where torch cannot say


def test_the_cosine_passes_half_its_height_half_way() -> None:
    found = rates(10, local(schedule="cosine", warmup=0.0))
    assert found[5] == pytest.approx(PEAK / 2)
    assert found[9] == pytest.approx(PEAK * 0.5 * (1 + math.cos(0.9 * math.pi)))
