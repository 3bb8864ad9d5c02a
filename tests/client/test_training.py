"""Local training lowers the loss, trains what it is told, and depends on nothing but its seed."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.adapter import Adapter, draw
from client.pruning import RestPenalty
from client.training import Trained, observe_steps, train
from core.errors import BouquetError
from models.tuned_model import TunedModel
from settings.keys import Value
from settings.run import LocalSettings
from tasks.encoding import Encoded
from tools.rehearsal.tiny_models import open_model, random_adapter, random_examples, settings_for

SEED = 2**61 + 7  # as large as a derived seed may be


@pytest.fixture
def tuned(llama_folder: Path) -> TunedModel:
    return open_model(llama_folder)


def local(**values: Value) -> LocalSettings:
    """Local settings in float32 on the CPU: batches of 4, unless told otherwise."""
    named = {f"local__{name}": value for name, value in values.items()}
    pinned: dict[str, Value] = {"local__batch_size": 4, "local__learning_rate": 0.01}
    return settings_for(Path("unused"), **(pinned | named)).local


def same_bytes(x: Adapter, y: Adapter) -> bool:
    return all(
        np.array_equal(x[name].a, y[name].a)
        and np.array_equal(x[name].b, y[name].b)
        and x[name].scale == y[name].scale
        for name in x
    )


def copies(examples: list[Encoded], count: int) -> list[Encoded]:
    return examples * count


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss(precision: str, tuned: TunedModel) -> None:
    examples = random_examples(tuned, 8)
    start = draw(tuned.shapes, rank=8, seed=0, scale=2.0)
    before = tuned.evaluate_global(None, start, examples).loss
    trained = train(tuned, examples, start, local(epochs=20, precision=precision), SEED)
    after = tuned.evaluate_global(None, trained.adapter, examples).loss
    assert after < before - 1.0


def test_what_comes_back_has_the_shape_and_scale_of_the_start(tuned: TunedModel) -> None:
    start = draw(tuned.shapes, rank=5, seed=0, scale=1.25)
    trained = train(tuned, random_examples(tuned, 8), start, local(), SEED).adapter
    assert trained.shapes == start.shapes
    assert {(f.rank, f.scale) for f in trained.values()} == {(5, 1.25)}
    assert not any(np.array_equal(trained[name].b, start[name].b) for name in start)
    assert not any(f.b.any() for f in start.values())  # the start itself is as it was


def test_the_report_counts_tokens_and_steps_and_means_the_loss_before_each(
    tuned: TunedModel,
) -> None:
    examples = random_examples(tuned, 10)
    start = random_adapter(tuned, 3)
    targets = sum(len(example.ids) - example.loss_from for example in examples)
    frozen = train(tuned, examples, start, local(epochs=2, learning_rate=1e-12), SEED)
    assert (frozen.steps, frozen.tokens, frozen.peak_bytes) == (6, 2 * targets, 0)
    whole = tuned.evaluate_global(None, start, examples).loss
    assert frozen.loss == pytest.approx(whole, rel=1e-5)


def test_at_most_max_steps_are_taken(tuned: TunedModel) -> None:
    seen: list[tuple[int, int]] = []
    settings = local(max_steps=3, epochs=4)
    with observe_steps(lambda step, steps: seen.append((step, steps))):
        trained = train(tuned, random_examples(tuned, 20), random_adapter(tuned, 2), settings, SEED)
    assert trained.steps == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    train(tuned, random_examples(tuned, 4), random_adapter(tuned, 2), settings, SEED)
    assert len(seen) == 3  # the observer is gone


@pytest.mark.parametrize(("trains", "other"), [("A", "b"), ("B", "a")])
def test_the_other_factor_stays_as_it_was_bit_by_bit(
    trains: str, other: str, tuned: TunedModel
) -> None:
    start = random_adapter(tuned, 4)
    settings = local(weight_decay=0.1)  # which a frozen factor must not feel
    adapter = train(tuned, random_examples(tuned, 8), start, settings, SEED, trains).adapter
    for name, factors in adapter.items():
        assert np.array_equal(getattr(factors, other), getattr(start[name], other))
        assert not np.array_equal(
            getattr(factors, trains.lower()), getattr(start[name], trains.lower())
        )


def test_two_batches_of_four_are_one_of_eight(tuned: TunedModel) -> None:
    examples, start = random_examples(tuned, 8), random_adapter(tuned, 4)
    whole = train(tuned, examples, start, local(batch_size=8, epochs=3), SEED)
    halves = train(tuned, examples, start, local(batch_size=4, accumulation=2, epochs=3), SEED)
    assert whole.steps == halves.steps == 3
    assert halves.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, factors in whole.adapter.items():
        np.testing.assert_allclose(halves.adapter[name].a, factors.a, atol=1e-4)
        np.testing.assert_allclose(halves.adapter[name].b, factors.b, atol=1e-4)
    apart = train(tuned, examples, start, local(batch_size=4, epochs=3), SEED)
    assert apart.steps == 6


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_who_trained_before_leaves_no_trace(dropout: float, llama_folder: Path) -> None:
    def play(tuned: TunedModel, client: int, rank: int, dropout: float = dropout) -> Trained:
        start = draw(tuned.shapes, rank, seed=client, scale=2.0)
        examples = random_examples(tuned, 10, seed=client)
        return train(tuned, examples, start, local(epochs=2), SEED + client, "both", dropout)

    alone = play(open_model(llama_folder), client=2, rank=4)
    crowded = open_model(llama_folder)
    play(crowded, client=1, rank=4)
    play(crowded, client=3, rank=7)
    play(crowded, client=5, rank=4, dropout=0.5)
    crowded.evaluate_global(
        random_adapter(crowded, 2), random_adapter(crowded, 3), random_examples(crowded, 4)
    )
    crowded.merge(None)
    torch.manual_seed(123)
    np.random.seed(123)
    after = play(crowded, client=2, rank=4)
    assert same_bytes(after.adapter, alone.adapter)
    assert (after.loss, after.tokens) == (alone.loss, alone.tokens)


def test_the_seed_decides_order_and_dropout(tuned: TunedModel) -> None:
    examples, start = random_examples(tuned, 12), random_adapter(tuned, 3)
    first = train(tuned, examples, start, local(), SEED).adapter
    assert same_bytes(train(tuned, examples, start, local(), SEED).adapter, first)
    assert not same_bytes(train(tuned, examples, start, local(), SEED + 1).adapter, first)
    one_batch = local(batch_size=12)  # no order is left to draw
    plain, dropped, again, other = (
        train(tuned, examples, start, one_batch, seed, "both", dropout).adapter
        for seed, dropout in ((SEED, 0.0), (SEED, 0.5), (SEED, 0.5), (SEED + 1, 0.5))
    )
    assert same_bytes(dropped, again)
    assert not same_bytes(dropped, plain)
    assert not same_bytes(dropped, other)


def test_training_leaves_base_and_random_numbers_as_they_were(tuned: TunedModel) -> None:
    merged = random_adapter(tuned, 2, seed=8)
    tuned.merge(merged)
    names = [f"{name}.weight" for name in tuned.targets] + ["model.embed_tokens.weight"]
    before = {name: tuned.model.get_parameter(name).detach().clone() for name in names}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(tuned, random_examples(tuned, 8), random_adapter(tuned, 3), local(), SEED, "both", 0.2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in tuned.model.modules())
    for name, weight in before.items():
        name = name if "embed" in name else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(tuned.model.get_parameter(name), weight)


def test_training_goes_on_over_the_merged_base(tuned: TunedModel) -> None:
    examples, start = random_examples(tuned, 8), random_adapter(tuned, 3)
    bare = train(tuned, examples, start, local(learning_rate=1e-12), SEED)
    merged = random_adapter(tuned, 4, seed=3)
    tuned.merge(merged)
    found = train(tuned, examples, start, local(learning_rate=1e-12), SEED)
    assert found.loss == pytest.approx(
        tuned.evaluate_global(merged, start, examples).loss, rel=1e-5
    )
    assert abs(found.loss - bare.loss) > 1e-3


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_do(tuned: TunedModel) -> None:
    examples, start = random_examples(tuned, 16), random_adapter(tuned, 3)
    settings = local(learning_rate=1e30, warmup=0.0, schedule="constant", max_grad_norm=0.0)
    with pytest.raises(
        BouquetError,
        match=r"^the training loss became (nan|inf) at step [23] of 4: lower local.learning-rate "
        r"\(now 1e\+30\) or local.max-grad-norm, or look for damaged examples",
    ):
        train(tuned, examples, start, settings, SEED)
    # The next client of this process is none the worse for it.
    after = train(tuned, examples, start, local(), SEED)
    assert math.isfinite(after.loss)
    fresh = open_model(Path(tuned.base.path))
    assert same_bytes(after.adapter, train(fresh, examples, start, local(), SEED).adapter)


def test_bfloat16_is_near_float32_but_not_it(tuned: TunedModel) -> None:
    examples, start = random_examples(tuned, 8), random_adapter(tuned, 3)
    exact, rounded = (
        train(tuned, examples, start, local(precision=precision), SEED)
        for precision in ("float32", "bfloat16")
    )
    assert exact.loss != rounded.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


@pytest.mark.parametrize("trains", ["A", "B", "both"])
def test_the_penalty_is_of_both_factors_of_each_module_whichever_train(
    trains: str, tuned: TunedModel
) -> None:
    start, seen = random_adapter(tuned, 4), []

    class Recorded(RestPenalty):
        def __call__(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
            seen.append([(a.detach().clone(), b.detach().clone()) for a, b in factors])
            return super().__call__(factors)

    settings = local(max_steps=1)
    train(
        tuned,
        random_examples(tuned, 4),
        start,
        settings,
        SEED,
        trains,
        penalties=[Recorded(0.1, 2)],
    )
    (pairs,) = seen
    for (a, b), name in zip(pairs, tuned.targets, strict=True):
        assert np.array_equal(a.numpy(), start[name].a)
        assert np.array_equal(b.numpy(), start[name].b)
