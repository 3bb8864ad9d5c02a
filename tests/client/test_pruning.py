"""The penalty on the last directions, and when a client drops them."""

import numpy as np
import pytest
import torch

from adapters.adapter import Adapter, Factors
from client.pruning import RestPenalty, kept_rank, pruned, rest_size
from tests.adapter_generators import make_adapter

SHAPES = {"q": (6, 9), "v": (5, 4)}
BEFORE = make_adapter(1, SHAPES, 4, 2.0)


def with_rest_times(adapter: Adapter, factor: float, rank: int) -> Adapter:
    modules = {}
    for name, f in adapter.items():
        b = f.b.copy()
        b[:, rank:] *= np.float32(factor)
        modules[name] = Factors(f.a, b, f.scale)
    return Adapter(modules)


@pytest.mark.parametrize(("factor", "rank"), [(0.9, 3), (1.1, 4), (1.0, 4)])
def test_the_rest_goes_only_where_it_shrank(factor: float, rank: int) -> None:
    after = with_rest_times(BEFORE, factor, 3)
    assert pruned(BEFORE, after, 0.99).rank == rank


def test_a_share_of_one_never_prunes() -> None:
    assert pruned(BEFORE, with_rest_times(BEFORE, 0.0, 3), 1.0).rank == 4


def test_rank_one_stays() -> None:
    one = make_adapter(2, SHAPES, 1, 1.0)
    assert kept_rank(1, 0.1) == 1
    assert pruned(one, with_rest_times(one, 0.0, 0), 0.5).rank == 1


def test_the_penalty_is_the_sum_of_products_of_norms_and_its_gradient_that_of_numbers() -> None:
    pairs = [
        tuple(torch.tensor(half, dtype=torch.float64, requires_grad=True) for half in (f.a, f.b))
        for f in BEFORE.values()
    ]
    penalty = RestPenalty(0.3, 2)
    by_hand = sum(
        np.sqrt((f.b[:, 2:] ** 2).sum()) * np.sqrt((f.a[2:] ** 2).sum()) for f in BEFORE.values()
    )
    assert float(penalty(pairs).detach()) == pytest.approx(0.3 * by_hand, rel=1e-6)
    assert rest_size(BEFORE, 2) == pytest.approx(by_hand, rel=1e-6)
    flat = [half for pair in pairs for half in pair]

    def of(*halves: torch.Tensor) -> torch.Tensor:
        return penalty([(halves[0], halves[1]), (halves[2], halves[3])])

    assert torch.autograd.gradcheck(of, flat)


def test_at_zero_the_gradient_is_zero_and_not_nan() -> None:
    a, b = torch.ones(3, 4, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    RestPenalty(1.0, 1)([(a, b)]).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
