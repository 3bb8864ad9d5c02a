"""Methods whose server holds arrays: a control variate, moments; and what may lie under a step."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors, draw
from core.errors import UsageError
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, Update
from tests.adapter_generators import make_adapter

SHAPES = {"q": (6, 8), "v": (4, 8)}


def gradients(seed: int) -> Adapter:
    return Adapter({n: Factors(f.a, f.b, 1.0) for n, f in make_adapter(seed, SHAPES, 2).items()})


def test_the_servers_control_variate_is_the_mean_of_all_clients_own() -> None:
    """Of a population of five, of whom two or three take part, in float64; c_k from nothing."""
    strategy = make_strategy("scaffold")
    model = strategy.begin(draw(SHAPES, 2, 1, 1.0))
    own = {
        k: {n: (np.zeros((2, 8)), np.zeros((m, 2))) for n, (m, _) in SHAPES.items()}
        for k in "abcde"
    }
    for number, present in enumerate(["ab", "bce", "ad"]):
        updates = []
        for k in present:
            change = gradients(10 * number + ord(k))
            updates.append(Update(k, 1 / len(present), make_adapter(3, SHAPES, 2), change))
            for name, f in change.items():
                own[k][name] = own[k][name][0] + f.a, own[k][name][1] + f.b
        model = strategy.aggregate(model, Cohort(updates, population=5)).model
        control = model.state["control"]
        assert isinstance(control, Adapter)
        for name in SHAPES:
            for place, found in enumerate((control[name].a, control[name].b)):
                wanted = sum(own[k][name][place] for k in own) / 5
                assert np.allclose(found, wanted, atol=1e-5)
                assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_what_does_not_average_is_refused_under_a_step(name: str) -> None:
    for over in ("flora", "frlora", "ideal", "nothing", name):
        with pytest.raises(UsageError, match=rf"strategy\.{name}\.over must be .* fedavg, .*; got"):
            make_strategy(name, over=over).properties  # noqa: B018
    titles = set()
    for over in STRATEGIES:
        if make_strategy(over).properties.averages:
            found = make_strategy(name, over=over).properties
            assert found.mixed_ranks == make_strategy(over).properties.mixed_ranks
            titles.add(found.title)
    assert len(titles) >= 7


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_moments_grow_with_the_start_and_are_saved_with_the_model(name: str) -> None:
    strategy = make_strategy(name, over="zero-padding")
    model = strategy.begin(draw(SHAPES, 2, 1, 1.0))
    for ranks in ((2, 1), (4, 2)):
        updates = [Update(str(r), 0.5, make_adapter(r, SHAPES, r)) for r in ranks]
        model = strategy.aggregate(model, Cohort(updates)).model
        assert model.start is not None
        held = [value for value in model.state.values() if isinstance(value, Adapter)]
        assert held
        assert all(value.rank == model.start.rank == max(ranks) for value in held)
