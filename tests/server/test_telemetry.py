"""The numbers of a round against whole float64 matrices."""

import numpy as np
import pytest

from adapters.adapter import Adapter, Factors
from adapters.algebra import beyond, pad, truncate
from server.broadcast import Asked, broadcast
from server.changes import COMPARED, Changes, compared, cosines, inner_products_of_changes
from server.combining import Combined, changes_of, frozen_tails
from server.telemetry import missed_norms, round_record
from strategies.strategy import Aggregated, Cohort, GlobalModel, Update
from strategies.zero_padding import ZeroPadding
from tests.adapter_generators import make_adapter
from tests.dense_oracle import Deltas, add, dense_deltas, frobenius
from tests.fake_clients import replied
from wire.rules import LocalRule

SHAPES = {"layers.1.q_proj": (8, 14), "layers.11.q_proj": (14, 8)}
RANKS = (5, 2, 3)
WEIGHTS = (0.5, 0.2, 0.3)
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


def record_of(
    tails: Adapter | None, rule: LocalRule | None = None, asked_ranks: tuple[int, ...] = RANKS
) -> dict[str, object]:
    before = GlobalModel(start=START)
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate(WEIGHTS)]
    after = ZeroPadding().aggregate(before, Cohort(updates)).model
    replies = [replied(TRAINED[k], f"c{k}", rank) for k, rank in enumerate(asked_ranks)]
    rule = rule or LocalRule(freezes_tail=tails is not None)
    asked = [Asked(reply.asked.member, rule) for reply in replies]
    combined = Combined(
        before,
        replies,
        Cohort(updates, tails),
        changes_of(replies, START),
        rule.freezes_tail,
        Aggregated(after),
    )
    return round_record(1, combined, after, asked, broadcast(before, "float32"), [])


def test_a_record_holds_norms_cosines_and_distribution_noise_by_module() -> None:
    record = record_of(None)
    changes = dense_changes(START)
    clients = record["clients"]
    assert isinstance(clients, list)
    for client, change in zip(clients, changes, strict=True):
        assert client["change_norm"] == pytest.approx(frobenius(change), rel=1e-6)
    norms = [frobenius(change) for change in changes]
    assert record["mean_change_norm"] == pytest.approx(np.mean(norms), rel=1e-6)
    ideal = {n: sum(w * c[n] for w, c in zip(WEIGHTS, changes, strict=True)) for n in SHAPES}
    assert record["ideal_change_norm"] == pytest.approx(frobenius(ideal), rel=1e-6)
    updates = [Update("", w, adapter) for w, adapter in zip(WEIGHTS, TRAINED, strict=True)]
    after = ZeroPadding().aggregate(GlobalModel(start=START), Cohort(updates)).model
    assert after.start is not None
    missed = frobenius(dense_deltas(beyond(after.start, 2)))
    assert clients[1]["distribution_noise"] == pytest.approx(missed / frobenius(ideal), rel=1e-6)
    noise = [client["distribution_noise"] for client in clients]
    assert noise[0] == 0.0
    assert noise[1] > noise[2] > 0.0
    by_module = record["module_distribution_noise"]
    assert isinstance(by_module, dict)
    assert set(by_module) == set(SHAPES)
    assert min(by_module.values()) > 0.0
    assert np.array(record["cosine"]).shape == (3, 3)
    assert "cosine_sampled" not in record


def test_what_a_client_cut_off_in_its_round_is_part_of_its_change() -> None:
    """It began from as many directions as it was asked to train, and fewer came back."""
    clients = record_of(None, asked_ranks=(5, 4, 3))["clients"]
    assert isinstance(clients, list)
    began = dense_deltas(truncate(START, 4))
    change = add(dense_deltas(TRAINED[1]), began, -1.0)
    assert clients[1]["change_norm"] == pytest.approx(frobenius(change), rel=1e-6)


def test_what_never_travelled_is_null_and_not_zero() -> None:
    record = record_of(None, LocalRule(sends="A", receives="A", keeps_b=True))
    for name in (
        "aggregation_noise",
        "noise_relative_to_model",
        "ideal_change_norm",
        "mean_change_norm",
        "effective_rank",
        "module_noise",
        "module_distribution_noise",
    ):
        assert record[name] is None, name
    assert "cosine" not in record
    clients = record["clients"]
    assert isinstance(clients, list)
    for client in clients:
        assert client["change_norm"] is client["distribution_noise"] is None


@pytest.mark.parametrize("keeps_b", [True, False])
def test_the_sum_of_what_clients_changed_is_formed_only_where_it_is_known(keeps_b: bool) -> None:
    replies = [replied(TRAINED[0], "c", 5, tokens=0)]
    whole = Cohort([Update("c", 1.0, TRAINED[0])])
    asked = [Asked(replies[0].asked.member, LocalRule(keeps_b=keeps_b))]
    before = GlobalModel(start=START)
    combined = Combined(
        before, replies, whole, changes_of(replies, START), False, Aggregated(before)
    )
    round_record(1, combined, before, asked, broadcast(before, "float32"), [])
    assert ("total" in vars(whole)) != keeps_b


def test_a_frozen_tail_is_not_missed() -> None:
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate(WEIGHTS)]
    tails = frozen_tails(updates, START)
    assert tails is not None
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
    start, weights = make_adapter(9, SHAPES, rank, 0.7), WEIGHTS
    updates = [Update(f"c{k}", w, TRAINED[k]) for k, w in enumerate(weights)]
    found = frozen_tails(updates, start)
    wanted = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for weight, own in zip(weights, RANKS, strict=True):
        for name, delta in dense_deltas(beyond(start, own)).items():
            wanted[name] = wanted[name] + weight * delta
    if rank <= min(RANKS):
        assert found is None
        return
    assert found is not None
    assert found.rank == rank - min(RANKS)
    for name, delta in dense_deltas(found).items():
        assert np.allclose(delta, wanted[name], atol=1e-6)
    assert frobenius(wanted) > 0.0


@pytest.mark.parametrize("start", [None, START, truncate(START, 1)])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_norms_are_those_of_dense_matrices_in_blocks_of_any_size(
    start: Adapter | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.changes.BLOCK", block)
    dense = dense_changes(start)
    found = Changes(TRAINED, start, RANKS)
    assert found.norms() == pytest.approx([frobenius(change) for change in dense], rel=1e-6)
    expected = np.array(dense_products(dense))
    assert np.allclose(found.products(), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    chosen = expected[np.ix_([0, 2], [0, 2])]
    assert np.allclose(found.of([0, 2]).products(), chosen, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("start", [None, START])
def test_a_client_without_any_direction_changed_only_what_it_left(start: Adapter | None) -> None:
    empty = truncate(TRAINED[0], 0)
    changes = Changes([TRAINED[1], empty, TRAINED[2]], start, [2, 3, 3])
    wanted = frobenius(dense_deltas(truncate(start, 3))) if start else 0.0
    assert changes.norms()[1] == pytest.approx(wanted, rel=1e-6)
    assert changes.products()[1, 1] == pytest.approx(wanted**2, rel=1e-6, abs=1e-9)


def test_a_change_that_is_rounding_is_none() -> None:
    back = Adapter({n: Factors(f.a / 3, f.b * np.float32(3), f.scale) for n, f in START.items()})
    assert Changes([back, TRAINED[0]], START, [5, 5]).norms()[0] == 0.0


def test_of_many_clients_some_are_compared_the_same_ones_every_time() -> None:
    many = COMPARED + 40
    chosen = compared(many, seed=3)
    assert chosen == compared(many, seed=3) != compared(many, seed=4)
    assert chosen == sorted(set(chosen or []))
    trained = [make_adapter(k, {"q": (6, 5)}, 1) for k in range(many)]
    replies = [replied(adapter, f"c{k}", 1, tokens=0) for k, adapter in enumerate(trained)]
    cohort = Cohort([Update(f"c{k}", 1 / many, x) for k, x in enumerate(trained)])
    made, changes = ZeroPadding().aggregate(GlobalModel(), cohort), changes_of(replies, None)
    asked = [Asked(reply.asked.member, LocalRule()) for reply in replies]
    record = round_record(
        1,
        Combined(GlobalModel(), replies, cohort, changes, False, made),
        made.model,
        asked,
        broadcast(GlobalModel(), "float32"),
        [],
        seed=3,
    )
    assert record["cosine_sampled"] == [f"c{k}" for k in chosen or []]
    assert len(record["clients"]) == many
    deltas = [dense_deltas(trained[k])["q"].ravel() for k in chosen or []]
    directions = np.array([delta / np.linalg.norm(delta) for delta in deltas])
    assert np.allclose(record["cosine"], directions @ directions.T, atol=1e-4)
