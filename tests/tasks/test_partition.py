"""Every example has one owner, whoever deals; what is held out is trained on by nobody."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.errors import UsageError
from settings.keys import Value
from settings.run import DataSettings, run_settings
from tasks.examples import Example, Reading
from tasks.partition import DEALERS, Federation, federate, global_held_out, hold_out, own_part
from tests.adapter_generators import QUICK


def settings(partition: str = "iid", **values: Value) -> DataSettings:
    """Data settings of this partition; `held_out=0.2` sets data.held-out."""
    layer = {f"data.{name.replace('_', '-')}": value for name, value in values.items()}
    return run_settings({"data.path": "mine.jsonl", "data.partition": partition}, layer).data


def deal(
    examples: Sequence[Example], clients: int, data: DataSettings, seed: int = 0
) -> Federation:
    """Federate these examples, without a file and without the cache."""
    reading = Reading(list(examples), (), {}, ())
    with patch("tasks.partition.read_data", return_value=reading):
        return federate.__wrapped__(data, clients, seed)


def numbered(count: int, groups: int = 5) -> list[Example]:
    """Distinct examples; group g has a share that grows with g."""
    owner = [int((index / count) ** 0.5 * groups) for index in range(count)]
    return [Example(f"p{i}", f"r{i}", f"g{owner[i]}") for i in range(count)]


def everything(federation: Federation) -> list[Example]:
    """All examples of a federation, wherever they lie."""
    parts = [example for part in federation.parts for example in part.train + part.held_out]
    return parts + federation.held_out


def texts(examples: Sequence[Example]) -> set[tuple[str, str]]:
    return {(example.prompt, example.response) for example in examples}


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[Example], int, int, float, float]:
    """Examples with copies among them, clients, a seed and the two shares to hold out."""
    clients = draw(st.integers(1, 5))
    groups = draw(st.integers(clients, 8))
    # One distinct example for each group, so that every client can be given one, and more of them.
    kinds = [(f"own{g}", f"g{g}") for g in range(groups)]
    more = draw(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, groups - 1))))
    rows = kinds * 12 + [(text, f"g{group}") for text, group in more]
    rows += [(f"filler{i}", f"g{i % groups}") for i in range(draw(st.integers(0, 60)))]
    examples = [Example(text, text.upper(), group) for text, group in rows]
    share = st.sampled_from([0.01, 0.1, 0.3, 0.5])
    return examples, clients, draw(st.integers(0, 2**31)), draw(share), draw(share)


@QUICK
@given(corpora(), st.sampled_from(["iid", "dirichlet", "natural"]))
def test_every_example_has_exactly_one_owner(
    corpus: tuple[list[Example], int, int, float, float], partition: str
) -> None:
    examples, clients, seed, share, own_share = corpus
    data = settings(partition, held_out=share, client_held_out=own_share)
    try:
        federation = deal(examples, clients, data, seed)
    except UsageError:
        assume(False)
    assert len(federation.parts) == clients
    assert Counter(everything(federation)) == Counter(examples)


@QUICK
@given(corpora(), st.sampled_from(["iid", "dirichlet", "natural"]))
def test_what_is_held_out_is_in_no_training_part_not_even_as_a_copy(
    corpus: tuple[list[Example], int, int, float, float], partition: str
) -> None:
    examples, clients, seed, share, own_share = corpus
    data = settings(partition, held_out=share, client_held_out=own_share)
    try:
        federation = deal(examples, clients, data, seed)
    except UsageError:
        assume(False)
    assert federation.held_out or len(texts(examples)) == 1
    for part in federation.parts:
        assert part.train
        assert not texts(federation.held_out) & texts(part.train + part.held_out)
        assert not texts(part.held_out) & texts(part.train)


@QUICK
@given(corpora())
def test_iid_parts_differ_in_size_by_at_most_one(
    corpus: tuple[list[Example], int, int, float, float],
) -> None:
    examples, clients, seed, share, _ = corpus
    data = settings("iid", held_out=share, client_held_out=0.0)
    try:
        sizes = [len(part.train) for part in deal(examples, clients, data, seed).parts]
    except UsageError:
        assume(False)
    assert max(sizes) - min(sizes) <= 1


@QUICK
@given(corpora())
def test_natural_parts_are_whole_groups_spread_evenly(
    corpus: tuple[list[Example], int, int, float, float],
) -> None:
    examples, clients, seed, share, _ = corpus
    data = settings("natural", held_out=share, client_held_out=0.0)
    try:
        parts = [part.train for part in deal(examples, clients, data, seed).parts]
    except UsageError:
        assume(False)
    groups = [{example.group for example in part} for part in parts]
    assert sum(map(len, groups)) == len(set().union(*groups))  # no group in two parts
    largest = max(Counter(example.group for part in parts for example in part).values())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= largest  # as the largest-first rule promises


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_who_owns_what_follows_the_seed(partition: str) -> None:
    # Copies of one text are never held out, so that only the dealing differs between seeds.
    copies = [Example("p", "r", f"g{index}") for index in range(300)]
    data = settings(partition, dirichlet_alpha=1.0)
    first, again, other = (deal(copies, 4, data, seed) for seed in (1, 1, 2))
    assert first == again
    owners = [
        {e.group: k for k, part in enumerate(f.parts) for e in part.train} for f in (first, other)
    ]
    assert len(owners[0]) == 300
    assert sum(owners[0][group] == owners[1][group] for group in owners[0]) < 150


def test_iid_owners_are_drawn_not_taken_in_turn() -> None:
    owner = DEALERS["iid"](numbered(300), 3, settings("iid"), np.random.default_rng(0))
    assert sum(k == index % 3 for index, k in enumerate(owner)) < 150
    for part in deal(numbered(300), 3, settings("iid")).parts:
        assert {example.group for example in part.train} == {f"g{g}" for g in range(5)}


def unevenness(alpha: float, clients: int = 4) -> float:
    """The mean over seeds and labels of the largest share that one client holds of a label."""
    examples, data = numbered(400), settings("dirichlet", dirichlet_alpha=alpha)
    shares = []
    for seed in range(10):
        owner = DEALERS["dirichlet"](examples, clients, data, np.random.default_rng(seed))
        for label in {example.group for example in examples}:
            owners = [k for k, e in zip(owner, examples, strict=True) if e.group == label]
            shares.append(max(Counter(owners).values()) / len(owners))
    return float(np.mean(shares))


def test_dirichlet_parts_grow_uneven_as_alpha_falls() -> None:
    even, mild, strong, single = (unevenness(alpha) for alpha in (1e5, 5.0, 0.3, 1e-6))
    assert even == pytest.approx(0.25, abs=0.02)  # a quarter for each of four clients
    assert even + 0.05 < mild < strong - 0.1
    assert strong < single - 0.1
    assert single == 1.0  # each label with one client


def test_one_label_says_nothing_of_the_next() -> None:
    owner = DEALERS["dirichlet"](
        numbered(400, groups=40),
        4,
        settings("dirichlet", dirichlet_alpha=1e-6),
        np.random.default_rng(0),
    )
    assert set(owner) == {0, 1, 2, 3}


def write(file: Path, examples: Sequence[Example]) -> str:
    rows = [{"prompt": e.prompt, "response": e.response, "package": e.group} for e in examples]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_files_are_one_for_each_client_in_the_order_named(tmp_path: Path) -> None:
    names = ["zoo", "ant", "bee"]
    paths = [
        write(tmp_path / f"{name}.jsonl", [Example(f"{name}{i}", "r", "") for i in range(20)])
        for name in names
    ]
    data = settings("files", path=",".join(paths))
    for name, part in zip(names, federate(data, 3, 0).parts, strict=True):
        prompts = [example.prompt for example in part.train + part.held_out]
        assert len(prompts) > 10
        assert all(prompt.startswith(name) for prompt in prompts)
    with pytest.raises(
        UsageError,
        match=r"needs one file for each of 2 clients; data.path names 3: .*zoo.jsonl, .*--clients",
    ):
        federate(data, 2, 0)


def test_too_few_groups_are_counted_in_the_error() -> None:
    expected = (
        "data.partition=natural deals whole groups of 'kind': 5 groups are not enough for 6 "
        "clients. Take fewer clients"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        deal(numbered(300), 6, settings("natural", field="kind"))


def test_clients_without_examples_are_named() -> None:
    expected = (
        "3 of 7 clients have no examples to train on: client-04, client-05, client-06. 4 examples "
        "are dealt by data.partition=iid, 1 are held out by data.held-out: take fewer clients"
    )
    with pytest.raises(UsageError, match=re.escape(expected)):
        deal(numbered(5), 7, settings("iid"))


def test_the_share_held_out_is_that_asked_for_and_at_least_one() -> None:
    for share, expected in ((0.25, 50), (0.001, 1), (0.5, 100)):
        rest, held = hold_out(numbered(200), share, seed=0)
        assert (len(rest), len(held)) == (200 - expected, expected)
    assert hold_out(numbered(200), 0.0, seed=0) == (numbered(200), [])
    assert len(hold_out(numbered(2), 0.5, seed=0)[1]) == 1


def test_one_distinct_example_is_trained_on() -> None:
    copies = [Example("p", "r", "")] * 4
    assert hold_out(copies, 0.5, seed=0) == (copies, [])


def test_holding_out_depends_on_the_texts_not_on_their_order() -> None:
    forward, backward = numbered(50), numbered(50)[::-1]
    assert texts(hold_out(forward, 0.2, 3)[1]) == texts(hold_out(backward, 0.2, 3)[1])
    assert texts(hold_out(forward, 0.2, 3)[1]) != texts(hold_out(forward, 0.2, 4)[1])


def test_both_parts_keep_the_order_of_the_examples() -> None:
    rest, held = hold_out(numbered(50), 0.3, seed=0)
    order = numbered(50).index
    assert sorted(rest, key=order) == rest
    assert sorted(held, key=order) == held


def test_a_run_may_use_some_of_the_examples_only(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(200))
    first, again, other = (
        federate(settings(path=path, max_examples=60), 4, seed) for seed in (0, 0, 1)
    )
    assert len(everything(first)) == 60
    assert first == again
    assert texts(everything(first)) != texts(everything(other))


@pytest.mark.parametrize("seed", range(8))
def test_a_sites_only_example_is_not_held_out(seed: int, tmp_path: Path) -> None:
    """Of two files with one example each and one with four, only the last can spare one."""
    sizes = {"one": 1, "four": 4, "alone": 1}
    paths = [
        write(tmp_path / f"{name}.jsonl", [Example(f"{name}{i}", "r", "") for i in range(size)])
        for name, size in sizes.items()
    ]
    federation = federate(settings("files", path=",".join(paths), held_out=0.5), 3, seed)
    assert [len(part.train + part.held_out) for part in federation.parts] == [1, 1, 1]
    assert len(federation.held_out) == 3
    assert all(example.prompt.startswith("four") for example in federation.held_out)


def test_no_group_of_a_natural_partition_vanishes_by_holding_out() -> None:
    examples = [Example(f"p{i}", "r", f"g{i % 20}") for i in range(30)]
    for seed in range(5):
        federation = deal(examples, 20, settings("natural", held_out=0.5), seed)
        assert len(federation.held_out) == 10


def test_identical_rows_are_counted() -> None:
    copies = [Example("p", "r", "")] * 3 + numbered(20)
    assert deal(copies, 2, settings()).counts == {"identical": 2}


def test_a_test_set_of_its_own_leaves_the_training_file_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(40))
    test = write(tmp_path / "test.jsonl", [*numbered(42)[38:], Example("q", "s", "")])
    federation = federate(settings(path=path, evaluation=test), 4, 0)
    assert sum(len(part.train) for part in federation.parts) == 40
    assert not any(part.held_out for part in federation.parts)
    assert [e.prompt for e in federation.held_out] == ["p38", "p39", "p40", "p41", "q"]
    assert (federation.counts, federation.test_counts) == ({}, {"test-seen": 2})
    assert global_held_out(settings(path=path, evaluation=test), 4, 0, 0) == federation.held_out
    asked = settings(path=path, evaluation=test, held_out=0.1, client_held_out=0.2)
    federation = federate(asked, 4, 0)
    assert federation.unused == 4
    assert sum(len(part.train) for part in federation.parts) == 28
    assert len(federation.held_out) == 5


def test_a_test_set_needs_the_mapped_fields_and_none_to_deal_by(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(40))
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "p", "answer": "r"}\n')
    with pytest.raises(UsageError, match=r"test.jsonl has no field 'response'"):
        federate(settings("natural", path=path, field="package", evaluation=str(test)), 2, 0)
    with pytest.raises(UsageError, match=r"data.evaluation names .*gone.jsonl', where there is no"):
        federate(settings(path=path, evaluation=f"{tmp_path}/gone.jsonl"), 2, 0)


def test_a_sites_test_set_is_what_it_evaluates_on(tmp_path: Path) -> None:
    path = write(tmp_path / "site.jsonl", numbered(50))
    test = write(tmp_path / "test.jsonl", numbered(53)[49:])
    part = own_part(settings(), path, 0, evaluation=test)
    assert (len(part.train), len(part.held_out), part.test_counts) == (50, 4, {"test-seen": 1})
    plain = own_part(settings(), path, 0)
    assert (len(plain.train), len(plain.held_out)) == (45, 5)
    assert len({part.fingerprint, plain.fingerprint}) == 2
    with pytest.raises(UsageError, match="evaluation-path names 'gone', where there is no file"):
        own_part(settings(), path, 0, evaluation="gone")


def test_a_chat_template_file_is_among_what_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(20))
    said = {"a": "{{ messages }}", "same": "{{ messages }}", "b": "{{ other }}"}
    found = {"none": (own_part(settings(), path, 0), federate(settings(path=path), 2, 0).parts[1])}
    for name, text in said.items():
        (tmp_path / name).write_text(text)
        data = settings(path=path, chat_template_file=str(tmp_path / name))
        found[name] = own_part(data, path, 0), federate(data, 2, 0).parts[1]
    for site in range(2):
        prints = {name: parts[site].fingerprint for name, parts in found.items()}
        templates = {name: parts[site].template for name, parts in found.items()}
        assert prints["a"] == prints["same"]
        assert templates["a"] == templates["same"]
        assert len(set(prints.values())) == len(set(templates.values())) == 3
        assert templates["none"] == ""


def test_the_global_held_out_part_is_cut_to_its_limit(tmp_path: Path) -> None:
    data = settings(path=write(tmp_path / "rows.jsonl", numbered(100)), held_out=0.3)
    whole = federate(data, 4, 0).held_out
    assert global_held_out(data, 4, 0, limit=0) == whole
    some = global_held_out(data, 4, 0, limit=10)
    assert len(some) == 10
    assert texts(some) < texts(whole)


def test_one_example_leaves_nothing_to_evaluate_on(tmp_path: Path) -> None:
    data = settings(path=write(tmp_path / "one.jsonl", numbered(1)))
    with pytest.raises(UsageError, match="for the global model: there is only one example"):
        global_held_out(data, 1, 0, limit=0)


def test_a_site_holds_out_its_share_of_its_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "site.jsonl", numbered(50))
    part = own_part(settings(client_held_out=0.2), path, seed=0)
    assert (len(part.train), len(part.held_out)) == (40, 10)
    assert not texts(part.train) & texts(part.held_out)


def test_a_sites_own_file_needs_no_field_to_deal_by(tmp_path: Path) -> None:
    (tmp_path / "site.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    part = own_part(settings("natural", field="package"), str(tmp_path / "site.jsonl"), seed=0)
    assert part.train == [Example("a", "b", "")]


def test_what_became_of_a_test_sets_rows_is_counted(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    rows = [{"prompt": f"p{k}", "response": f"r{k}"} for k in range(6)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    odd = [{"prompt": "a", "response": None}, {"prompt": "b", "response": ""}, rows[0], rows[0]]
    test.write_text("".join(json.dumps(row) + "\n" for row in odd))
    values = {"data.path": str(train), "data.evaluation": str(test)}
    found = federate(run_settings(values).data, 2, 0)
    assert found.test_counts == {"null": 1, "empty": 1, "identical": 1, "test-seen": 2}
    part = own_part(run_settings().data, str(train), 0, evaluation=str(test))
    assert part.test_counts == found.test_counts


def test_why_nothing_can_be_held_out_is_said(tmp_path: Path) -> None:
    file = tmp_path / "same.jsonl"
    file.write_text(
        '{"prompt": "p", "response": "r"}\n' * 4 + '{"prompt": "p", "response": null}\n'
    )
    data = run_settings({"data.path": str(file)}).data
    with pytest.raises(UsageError, match="all 4 examples are the same one, 1 more are null"):
        global_held_out(data, 2, 0, 0)
    with pytest.raises(UsageError, match=r"data\.held-out is 0"):
        global_held_out(run_settings({"data.path": str(file), "data.held-out": "0"}).data, 2, 0, 0)
