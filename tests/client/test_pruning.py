"""The penalty on the last directions."""

import numpy as np
import pytest
import torch

from adapters.pruning import rest_size
from client.pruning import RestPenalty
from tests.adapter_generators import make_adapter

SHAPES = {"q": (6, 9), "v": (5, 4)}
BEFORE = make_adapter(1, SHAPES, 4, 2.0)


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


def test_where_there_is_no_rest_the_penalty_is_zero() -> None:
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    penalty = RestPenalty(1.0, 3)([(a, b)])
    penalty.backward()
    assert float(penalty.detach()) == 0.0
    assert a.grad is not None
    assert not a.grad.any()
