"""The rank that is left when a client prunes, and when it does."""

from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter import Adapter, Factors
from adapters.pruning import kept_rank, pruned
from tests.adapter_generators import make_adapter

SHAPES = {"q": (6, 9), "v": (5, 4)}
BEFORE = make_adapter(1, SHAPES, 4, 2.0)


@given(rank=st.integers(1, 500), hundredths=st.integers(1, 100), least=st.integers(1, 500))
def test_the_rank_is_that_of_decimal_arithmetic(rank: int, hundredths: int, least: int) -> None:
    whole = (Decimal(hundredths) * rank / 100).quantize(Decimal(1), ROUND_HALF_EVEN)
    assert kept_rank(rank, hundredths / 100, least) == max(int(whole), min(rank, least))


@pytest.mark.parametrize(
    ("rank", "share", "kept"), [(90, 0.7, 63), (4, 0.99, 4), (50, 0.99, 50), (64, 0.99, 63)]
)
def test_no_float_artefact_lowers_a_rank(rank: int, share: float, kept: int) -> None:
    assert kept_rank(rank, share) == kept


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
    assert pruned(BEFORE, after, kept_rank(4, 0.75)).rank == rank


def test_a_share_of_one_and_the_least_rank_never_prune() -> None:
    after = with_rest_times(BEFORE, 0.0, 3)
    assert pruned(BEFORE, after, kept_rank(4, 1.0)).rank == 4
    assert pruned(BEFORE, after, kept_rank(4, 0.5, 4)).rank == 4


def test_rank_one_stays() -> None:
    one = make_adapter(2, SHAPES, 1, 1.0)
    assert kept_rank(1, 0.1) == 1
    assert pruned(one, with_rest_times(one, 0.0, 0), 1).rank == 1
