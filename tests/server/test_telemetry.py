"""The numbers of a round against whole float64 matrices."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors
from adapters.algebra import beyond, pad, truncate
from server.aggregation import frozen_tails
from server.broadcast import Asked, broadcast
from server.exchange import Reply
from server.roster import Member
from server.telemetry import cosines, inner_products_of_changes, missed_norms, round_record
from strategies.strategy import GlobalModel, LocalRule, Update
from strategies.zero_padding import ZeroPadding
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, add, dense_deltas, frobenius

SHAPES = {"layers.1.q_proj": (8, 14), "layers.11.q_proj": (14, 8)}
RANKS = (5, 2, 3)
START = make_adapter(50, SHAPES, 5, 0.7)
TRAINED = [make_adapter(k, SHAPES, rank, 16 / rank) for k, rank in enumerate(RANKS)]


def dense_changes(start: Adapter | None) -> list[Deltas]:
    if start is None:
        return [dense_deltas(adapter) for adapter in TRAINED]
    return [
        add(dense_deltas(adapter), dense_deltas(truncate(start, rank)), -1.0)
        for adapter, rank in zip(TRAINED, RANKS, strict=True)
    ]


def dense_products(changes: list[Deltas]) -> list[list[float]]:
    return [[sum(float((x[n] * y[n]).sum()) for n in SHAPES) for y in changes] for x in changes]


@pytest.mark.parametrize("start", [None, START, truncate(START, 1), pad(START, 7)])
def test_products_of_changes_are_those_of_dense_matrices(start: Adapter | None) -> None:
    expected = np.array(dense_products(dense_changes(start)))
    found = inner_products_of_changes(TRAINED, start)
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    norms = np.sqrt(np.diag(expected))
    assert np.allclose(cosines(found), expected / np.outer(norms, norms), atol=1e-6)


def test_a_client_that_did_not_move_has_norm_zero_and_no_direction() -> None:
    products = inner_products_of_changes([START, TRAINED[0]], START)
    assert products[0, 0] <= 1e-9 * products[1, 1]
    still = cosines(np.array([[0.0, 0.0], [0.0, 4.0]]))
    assert still.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_what_a_client_of_lower_rank_misses_is_the_rest_of_the_start() -> None:
    whole, seen = dense_deltas(START), dense_deltas(truncate(START, 2))
    for name, missed in missed_norms(START, 2).items():
        assert missed == pytest.approx(np.linalg.norm(whole[name] - seen[name]), rel=1e-6)
    assert missed_norms(START, 5) == missed_norms(None, 2) == {}


def record_of(tails: list[Update]) -> dict[str, object]:
    before = GlobalModel(start=START)
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate((0.5, 0.2, 0.3))]
    after = ZeroPadding().aggregate(before, updates)
    replies = [
        Reply(Member(f"c{k}", k, k, rank, 10, "b", ()), TRAINED[k], 10, {"tokens": 5.0}, 100)
        for k, rank in enumerate(RANKS)
    ]
    asked = [Asked(reply.member, LocalRule()) for reply in replies]
    sent = broadcast(before, "float32")
    return round_record(1, before, after, asked, sent, replies, updates, tails, [], bool(tails))


def test_a_record_holds_norms_cosines_and_distribution_noise_by_module() -> None:
    record = record_of([])
    changes = dense_changes(START)
    clients = record["clients"]
    assert isinstance(clients, list)
    for client, change in zip(clients, changes, strict=True):
        assert client["delta_norm"] == pytest.approx(frobenius(change), rel=1e-6)
    noise = [client["distribution_noise"] for client in clients]
    assert noise[0] == 0.0
    assert noise[1] > noise[2] > 0.0
    by_module = record["module_distribution_noise"]
    assert isinstance(by_module, dict)
    assert set(by_module) == set(SHAPES)
    assert min(by_module.values()) > 0.0
    assert np.array(record["cosine"]).shape == (3, 3)


def test_a_frozen_tail_is_not_missed() -> None:
    replies = [
        Reply(Member(f"c{k}", k, k, rank, 10, "b", ()), TRAINED[k], 10, {}, 100)
        for k, rank in enumerate(RANKS)
    ]
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate((0.5, 0.2, 0.3))]
    tails = frozen_tails(replies, updates, START)
    clients = record_of(tails)["clients"]
    assert isinstance(clients, list)
    assert [client["distribution_noise"] for client in clients] == [0.0, 0.0, 0.0]


def test_scales_count() -> None:
    doubled = Adapter({n: Factors(f.a, f.b, 2 * f.scale) for n, f in TRAINED[1].items()})
    one = inner_products_of_changes([TRAINED[0], TRAINED[1]], None)
    two = inner_products_of_changes([TRAINED[0], doubled], None)
    assert two[0, 1] == pytest.approx(2 * one[0, 1])
    assert two[1, 1] == pytest.approx(4 * one[1, 1])


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8])
def test_frozen_tails_together_are_the_weighted_sum_of_each(rank: int) -> None:
    start, weights = make_adapter(9, SHAPES, rank, 0.7), (0.5, 0.2, 0.3)
    replies = [
        Reply(Member(f"c{k}", k, k, own, 10, "b", ()), TRAINED[k], 10, {}, 100)
        for k, own in enumerate(RANKS)
    ]
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate(weights)]
    found = frozen_tails(replies, updates, start)
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for weight, own in zip(weights, RANKS, strict=True):
        for name, delta in dense_deltas(beyond(start, own)).items():
            wanted[name] = wanted[name] + weight * delta
    if rank <= min(RANKS):
        assert found == []
        return
    (update,) = found
    assert update.weight == 1.0
    assert update.adapter.rank == rank - min(RANKS)
    for name, delta in dense_deltas(update.adapter).items():
        assert np.allclose(delta, wanted[name], atol=1e-6)
    assert frobenius(wanted) > 0.0
