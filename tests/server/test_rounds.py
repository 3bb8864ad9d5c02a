"""The loop over rounds: exact, resumable, and deaf to bad clients and to the order of replies."""

import json
import shutil
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter, Delta, Factors, draw
from adapters.algebra import truncate
from client.pieces import open_pieces
from core.errors import BouquetError, UsageError
from journal.live_status import read_live_status
from journal.run_folder import RunFolder, read_config
from journal.state import load_state
from server.rounds import run_rounds
from settings.keys import Value, flatten_tables
from settings.knobs import KNOBS, RETIRED
from settings.run import RunSettings
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from strategies.registry import STRATEGIES as REGISTERED
from strategies.registry import make_strategy
from strategies.strategy import GlobalModel
from tests.dense_oracle import dense
from tests.fake_clients import SHAPES, fake_app, fake_grid, settings_of
from wire.codec import pack, unpack
from wire.messages import parts_in
from wire.records import from_record, to_record


def play(settings: RunSettings, app: ClientApp | None = None) -> Path:
    return run_rounds(fake_grid(settings, app), settings)


def without_timings(record: Any) -> Any:
    if isinstance(record, dict):
        return {k: without_timings(v) for k, v in record.items() if not k.endswith("seconds")}
    return [without_timings(item) for item in record] if isinstance(record, list) else record


def rounds_of(folder: Path) -> list[Any]:
    return [without_timings(record) for record in RunFolder(folder).rounds()]


def state_bytes(folder: Path) -> dict[str, bytes]:
    newest = max((folder / "state").glob("round-*"))
    found = sorted([*newest.glob("*.safetensors"), *newest.glob("state.json")])
    return {path.name: path.read_bytes() for path in found}


def adapter_bytes(folder: Path) -> bytes | None:
    path = folder / "adapter" / "adapter_model.safetensors"
    return path.read_bytes() if path.exists() else None


def kept_bytes(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "clients").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def merged_of(folder: Path) -> Delta:
    state = load_state(folder / "state")
    assert state is not None
    assert state.model.merged is not None
    return state.model.merged


STRATEGIES: list[dict[str, Value]] = [
    {"strategy__name": name}
    if make_strategy(name).properties.mixed_ranks
    else {"strategy__name": name, "lora__rank": "2"}
    for name in REGISTERED
]


@pytest.mark.parametrize("values", STRATEGIES, ids=lambda v: v["strategy__name"])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, values: dict[str, Value], stop_after: int
) -> None:
    values = {"rounds": 4, "clients__fraction": 0.6, "evaluate__clients": True, **values}
    whole = play(settings_of(tmp_path / "whole", **values))

    def crash(client: int, message: Message, reply: Message) -> Message:
        if message.metadata.group_id == str(stop_after + 1):
            raise KeyboardInterrupt
        return reply

    settings = settings_of(tmp_path / "torn", **values)
    with pytest.raises(KeyboardInterrupt):
        play(settings, fake_app(tamper=crash))
    with (tmp_path / "torn" / "rounds.jsonl").open("a") as log:
        log.write('{"round": 99, "a torn li')
    again = play(settings_of(tmp_path / "torn", resume=True, **values))
    assert rounds_of(again) == rounds_of(whole)
    assert state_bytes(again) == state_bytes(whole)
    assert adapter_bytes(again) == adapter_bytes(whole)
    strategy = make_strategy(str(values["strategy__name"]))
    personal = strategy.properties.personal
    assert (adapter_bytes(whole) is None) == personal  # there is no global model to write
    keeps = personal or strategy.local_rule(GlobalModel(state={"turn": "B"}), "").control
    assert bool(kept_bytes(whole)) == keeps
    assert kept_bytes(again) == kept_bytes(whole)


def test_flora_over_the_wire_is_the_dense_sum_of_what_the_clients_trained(tmp_path: Path) -> None:
    """Independent of the server: the clients' own factors, caught on their way, in float64."""
    sent: list[tuple[int, Adapter]] = []

    def spy(client: int, message: Message, reply: Message) -> Message:
        if "adapter" in reply.content:
            data = next(iter(reply.content["adapter"].values())).data
            sent.append((10 * (client + 1), unpack(data)))
        return reply

    folder = play(settings_of(tmp_path / "run", rounds=2), fake_app(tamper=spy))
    merged = merged_of(folder)
    for name in SHAPES:
        expected = sum(n / 60 * dense(adapter[name]) for n, adapter in sent)
        error = np.linalg.norm(dense(merged[name]) - expected) / np.linalg.norm(expected)
        assert error < 1e-6
    assert all(record["aggregation_noise"] < 1e-6 for record in rounds_of(folder)[1:])


@pytest.mark.parametrize("policy", ["keep-a", "increment", "global"])
def test_a_warm_start_over_the_wire_adds_up_what_the_clients_moved(
    tmp_path: Path, policy: str
) -> None:
    """In float64: each round, sum p_k (delta after training - delta of what was begun from)."""
    moved = {name: np.zeros(shape) for name, shape in SHAPES.items()}

    def spy(client: int, message: Message, reply: Message) -> Message:
        if "adapter" in reply.content:
            after = unpack(from_record(reply.content["adapter"]))
            parts = parts_in(message.content)
            assert parts is not None
            _, start = open_pieces(message.content, parts, None)
            if "start" in message.content:
                start = unpack(from_record(message.content["start"]))
            for name, factors in after.items():
                delta = dense(factors)
                if start is not None:
                    delta = delta - dense(truncate(start, factors.rank)[name])
                moved[name] += 10 * (client + 1) / 60 * delta
        return reply

    settings = settings_of(tmp_path / "run", rounds=4, start__policy=policy)
    folder = play(settings, fake_app(tamper=spy))
    state = load_state(folder / "state")
    assert state is not None
    assert state.model.start is not None
    total = state.model.total()
    assert total is not None
    for name in SHAPES:
        error = np.linalg.norm(dense(total[name]) - moved[name])
        assert error <= 2e-6 * np.linalg.norm(moved[name])
    records = rounds_of(folder)
    assert all(record["aggregation_noise"] < 1e-6 for record in records[1:])
    assert all(c["distribution_noise"] == 0.0 for r in records[1:] for c in r["clients"])


@pytest.mark.parametrize("values", STRATEGIES, ids=lambda v: v["strategy__name"])
def test_a_bad_client_leaves_the_result_as_if_it_had_not_answered(
    tmp_path: Path, values: dict[str, Value]
) -> None:
    def poison(client: int, message: Message, reply: Message) -> Message:
        if client == 1 and "adapter" in reply.content:
            reply.content["metrics"]["num-examples"] = -5  # type: ignore[index]
        return reply

    def silence(client: int, message: Message, reply: Message) -> Message | None:
        return None if client == 1 and "adapter" in reply.content else reply

    poisoned = play(settings_of(tmp_path / "poisoned", **values), fake_app(tamper=poison))
    silent = play(settings_of(tmp_path / "silent", **values), fake_app(tamper=silence))
    assert state_bytes(poisoned) == state_bytes(silent)
    for record in rounds_of(poisoned)[1:]:
        (failure,) = record["failures"]
        assert failure["client"] == "client-01"
        assert "num-examples must be a whole number from 1" in failure["reason"]
        assert [client["client"] for client in record["clients"]] == ["client-00", "client-02"]


def test_the_order_of_replies_does_not_matter(tmp_path: Path) -> None:
    class Shuffled(InProcessGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            replies = list(super().pull_messages(message_ids))
            return replies[1:][::-1] + replies[:1]

    plain = settings_of(tmp_path / "plain")
    shuffled = settings_of(tmp_path / "shuffled")
    grid = fake_grid(shuffled)
    grid.__class__ = Shuffled
    run_rounds(grid, shuffled)
    play(plain)
    assert state_bytes(tmp_path / "plain") == state_bytes(tmp_path / "shuffled")
    assert rounds_of(tmp_path / "plain") == rounds_of(tmp_path / "shuffled")


def test_partial_participation_asks_the_sampled_clients_only(tmp_path: Path) -> None:
    folder = play(settings_of(tmp_path / "run", rounds=6, clients__fraction=0.5))
    cohorts = [[c["client"] for c in record["clients"]] for record in rounds_of(folder)[1:]]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    for record in rounds_of(folder)[1:]:
        assert sum(client["weight"] for client in record["clients"]) == pytest.approx(1.0)


def test_uniform_weights_on_request(tmp_path: Path) -> None:
    folder = play(settings_of(tmp_path / "run", rounds=1, clients__weights="uniform"))
    (record,) = rounds_of(folder)[1:]
    assert [client["weight"] for client in record["clients"]] == pytest.approx([1 / 3] * 3)


class Weighing(InProcessGrid):
    """Weighs what goes over it: by (kind, round), up and down, and down by client."""

    up: Counter[int]
    down: Counter[tuple[str, int]]
    to: Counter[tuple[int, int]]

    def push_messages(self, messages: Any) -> Any:
        for message in messages:
            if "instruction" in message.content:
                number, size = int(message.metadata.group_id), _array_bytes(message.content)
                self.down[message.metadata.message_type, number] += size
                if message.metadata.message_type == "train":
                    self.to[number, message.metadata.dst_node_id] += size
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Any) -> Any:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if "adapter" in reply.content:
                self.up[int(reply.metadata.group_id)] += _array_bytes(reply.content)
        return replies


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("values", STRATEGIES, ids=lambda v: v["strategy__name"])
def test_bytes_are_those_really_sent(
    tmp_path: Path, values: dict[str, Value], evaluates: bool
) -> None:
    settings = settings_of(
        tmp_path / "run", rounds=4, clients__fraction=0.6, evaluate__clients=evaluates, **values
    )
    grid = fake_grid(settings)
    grid.__class__ = Weighing
    assert isinstance(grid, Weighing)
    grid.up, grid.down, grid.to = Counter(), Counter(), Counter()
    records = rounds_of(run_rounds(grid, settings))[1:]
    for record in records:
        number = record["round"]
        assert record["bytes_up"] == grid.up[number]
        assert record["bytes_down"] == grid.down["train", number]
        for client in record["clients"]:
            node = FIRST_CLIENT_NODE + int(client["client"][-2:])
            assert client["bytes_down"] == grid.to[number, node]
        if evaluates:
            assert record["evaluate_bytes_down"] == grid.down["evaluate", number]


@pytest.mark.parametrize("values", STRATEGIES, ids=lambda v: v["strategy__name"])
def test_bytes_of_training_do_not_depend_on_evaluation(
    tmp_path: Path, values: dict[str, Value]
) -> None:
    found = []
    for evaluates in (False, True):
        settings = settings_of(
            tmp_path / str(evaluates), clients__fraction=0.6, evaluate__clients=evaluates, **values
        )
        found.append([record["bytes_down"] for record in rounds_of(play(settings))[1:]])
    assert found[0] == found[1]


def _array_bytes(content: RecordDict) -> int:
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )


def test_too_few_usable_replies_stop_the_run_with_their_reasons(tmp_path: Path) -> None:
    def crash(client: int, message: Message, reply: Message) -> Message | None:
        return None if "adapter" in reply.content else reply

    with pytest.raises(BouquetError, match=r"round 1 has 0 usable replies.*client-00: .*crashed"):
        play(settings_of(tmp_path / "run"), fake_app(tamper=crash))


def test_mixed_ranks_are_refused_before_the_run_begins(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"rank 3: client-00, rank 2: client-01, rank 1: "
    ) as caught:
        play(settings_of(tmp_path / "run", strategy__name="fedavg"))
    assert "flora, flora-warm, zero-padding" in str(caught.value)
    folder = RunFolder(tmp_path / "run")
    assert folder.never_began()
    told = read_live_status(folder.path)
    assert told is not None
    assert (told.state, told.failure) == ("failed", str(caught.value))
    play(settings_of(tmp_path / "run"))  # which takes mixed ranks, in the same folder


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=r"exists already\. Choose another output") as caught:
        play(settings_of(tmp_path / "run"))
    assert "--" not in str(caught.value)  # flwr run has no such options
    assert "give the same flwr run command again: with resume=true and output=" in str(caught.value)


@pytest.mark.parametrize("torn", [False, True], ids=["no folder", "a folder without config"])
def test_resume_begins_a_run_that_is_not_there(torn: bool, tmp_path: Path) -> None:
    if torn:
        (tmp_path / "new").mkdir()
    play(settings_of(tmp_path / "new", resume=True))
    play(settings_of(tmp_path / "run"))
    assert state_bytes(tmp_path / "new") == state_bytes(tmp_path / "run")


def test_a_run_taken_up_leaves_out_who_has_other_data(tmp_path: Path) -> None:
    data = {0: "aa", 1: "bb", 2: "cc"}

    def say(client: int, message: Message, reply: Message) -> Message:
        if "site" in reply.content:
            reply.content.config_records["site"]["data"] = data[client]
        else:
            reply.content.config_records["reply"]["data"] = data[client]
        return reply

    app = fake_app(tamper=say)
    play(settings_of(tmp_path / "run", rounds=1), app)
    data[1] = "b0"
    play(settings_of(tmp_path / "run", rounds=2, resume=True), app)
    first, second = rounds_of(tmp_path / "run")[1:]
    assert [c["client"] for c in first["clients"]] == ["client-00", "client-01", "client-02"]
    assert [c["client"] for c in second["clients"]] == ["client-00", "client-02"]
    data[1] = "bb"
    play(settings_of(tmp_path / "run", rounds=3, resume=True), app)
    assert len(rounds_of(tmp_path / "run")[3]["clients"]) == 3


def test_who_changes_its_data_between_rounds_is_excluded_then_left_out(tmp_path: Path) -> None:
    """It does not connect anew, so nobody asks it who it is: its reply tells."""
    told: dict[int, list[str]] = {}

    def say(client: int, message: Message, reply: Message) -> Message:
        content: Any = message.content
        if "instruction" in content:
            server_round = content["instruction"]["round"]
            told.setdefault(server_round, []).append(f"client-0{client}")
        if client == 1 and max(told, default=0) >= 2:
            name = "site" if "site" in reply.content else "reply"
            reply.content.config_records[name]["data"] = "b0"
        return reply

    play(settings_of(tmp_path / "run", rounds=4), fake_app(tamper=say))
    first, second, third, fourth = rounds_of(tmp_path / "run")[1:]
    everybody = ["client-00", "client-01", "client-02"]
    assert [c["client"] for c in first["clients"]] == everybody
    (failure,) = second["failures"]
    assert failure["client"] == "client-01"
    assert failure["reason"] == (
        "its data changed since the run began (hash 'b0', before 'da7a0001'): bring them back, or "
        "begin a new run"
    )
    for record in (second, third, fourth):
        assert [c["client"] for c in record["clients"]] == ["client-00", "client-02"]
    assert [third["failures"], fourth["failures"]] == [[], []]
    assert {*told[1]} == {*told[2]} == {*everybody}
    assert {*told[4]} == {"client-00", "client-02"}


def test_resume_needs_the_same_configuration(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    with pytest.raises(UsageError, match=r"seed was 0 and is now 7"):
        play(settings_of(tmp_path / "run", rounds=1, resume=True, seed=7))
    with pytest.raises(UsageError, match="has base model other-base, the run's is fake-base"):
        play(settings_of(tmp_path / "run", rounds=2, resume=True), fake_app(base="other-base"))


def test_two_servers_of_one_run_do_not_write_at_once(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    lock, refused = RunFolder(tmp_path / "run").locked(), "another process is running"
    with lock, pytest.raises(UsageError, match=refused):
        play(settings_of(tmp_path / "run", rounds=2, resume=True))
    play(settings_of(tmp_path / "run", rounds=2, resume=True))


@pytest.mark.parametrize("rule", ["examples", "uniform", "geometric-median"])
def test_a_crowd_of_three_outvotes_a_liar_only_under_the_robust_rule(
    rule: Value, tmp_path: Path
) -> None:
    def lie(client: int, message: Message, reply: Message) -> Message:
        if client == 3 and "adapter" in reply.content:
            honest = unpack(from_record(reply.content["adapter"]))
            far = {n: Factors(f.a, f.b * np.float32(90), f.scale) for n, f in honest.items()}
            reply.content["adapter"] = to_record(pack(Adapter(far)))
        return reply

    values: dict[str, Value] = {"clients__count": 4, "lora__rank": "2", "rounds": 1}
    values |= {"clients__weights": rule, "clients__max_norm_ratio": 0.0}
    lied = play(settings_of(tmp_path / "lied", **values), fake_app(tamper=lie))
    norms = [client["change_norm"] for client in rounds_of(lied)[1]["clients"]]
    ratio = rounds_of(lied)[1]["ideal_change_norm"] / max(norms[:3])
    assert norms[3] > 50 * max(norms[:3])
    assert (ratio < 3) == (rule == "geometric-median")


def test_a_finished_run_can_be_given_more_rounds(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "long", rounds=4))
    play(settings_of(tmp_path / "short", rounds=2))
    play(settings_of(tmp_path / "short", rounds=4, resume=True))
    assert state_bytes(tmp_path / "short") == state_bytes(tmp_path / "long")


def test_a_lost_log_is_an_error_and_not_a_gap(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    (tmp_path / "run" / "rounds.jsonl").write_text("")
    with pytest.raises(BouquetError, match="shorter than when its newest round was saved"):
        play(settings_of(tmp_path / "run", rounds=2, resume=True))


def test_a_damaged_newest_state_costs_one_round_and_no_bit(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "whole"))
    play(settings_of(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "state" / "round-0003" / "piece-000.safetensors").write_bytes(b"")
    play(settings_of(tmp_path / "run", resume=True))
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "whole")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert rounds_of(tmp_path / "run") == rounds_of(tmp_path / "whole")


def test_every_line_of_the_log_is_json_that_names_its_units(tmp_path: Path) -> None:
    folder = play(settings_of(tmp_path / "run", evaluate__clients=True))
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert first["base"] == "fake-base"
    assert [(c["client"], c["rank"], c["num_examples"]) for c in first["present"]] == [
        ("client-00", 3, 10),
        ("client-01", 2, 20),
        ("client-02", 1, 30),
    ]
    assert last["client_held_out_loss"] == pytest.approx(2.0)
    assert set(last["module_noise"]) == set(SHAPES)
    assert {"train_seconds", "aggregate_seconds", "bytes_up", "effective_rank"} <= set(last)


def test_a_liar_about_a_alone_is_outvoted_and_excluded_where_b_never_travels(
    tmp_path: Path,
) -> None:
    def lie(client: int, message: Message, reply: Message) -> Message:
        if client == 3 and "adapter" in reply.content:
            start = unpack(from_record(message.content["start"]), known=draw(SHAPES, 2, 1, 1.0))
            sent = unpack(from_record(reply.content["adapter"]), start)
            far = {n: Factors(f.a * np.float32(2000), f.b, f.scale) for n, f in sent.items()}
            reply.content["adapter"] = to_record(pack(Adapter(far), factors="A"))
        return reply

    values: dict[str, Value] = {"clients__count": 4, "lora__rank": "2", "rounds": 1}
    values |= {"strategy__name": "fedsa-lora", "clients__weights": "geometric-median"}
    guarded = play(settings_of(tmp_path / "guarded", **values), fake_app(tamper=lie))
    (failure,) = rounds_of(guarded)[1]["failures"]
    assert failure["client"] == "client-03"
    assert "times the median" in failure["reason"]
    values["clients__max_norm_ratio"] = 0.0
    outvoted = play(settings_of(tmp_path / "outvoted", **values), fake_app(tamper=lie))
    assert [client["weight"] < 0.01 for client in rounds_of(outvoted)[1]["clients"]] == [
        *(False, False, False),
        True,
    ]


class NobodyIsAsked(InProcessGrid):
    """Fails where a message is sent."""

    def push_messages(self, messages: Any) -> Any:
        raise AssertionError("somebody was asked")


def silent_grid(settings: RunSettings) -> InProcessGrid:
    grid = fake_grid(settings)
    grid.__class__ = NobodyIsAsked
    return grid


def test_a_changed_key_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    other = settings_of(tmp_path / "run", rounds=2, resume=True, seed=99)
    with pytest.raises(UsageError, match="seed was 0 and is now 99"):
        run_rounds(silent_grid(other), other)


def test_a_held_lock_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    more = settings_of(tmp_path / "run", rounds=2, resume=True)
    holder = RunFolder(tmp_path / "run")
    with holder.locked(), pytest.raises(UsageError, match="another process is running"):
        run_rounds(silent_grid(more), more)


def test_the_configuration_follows_a_run_that_goes_on_for_longer(tmp_path: Path) -> None:
    play(settings_of(tmp_path / "run", rounds=1))
    play(settings_of(tmp_path / "run", rounds=3, resume=True))
    assert read_config(tmp_path / "run" / "config.toml")["rounds"] == 3
    told = read_live_status(tmp_path / "run")
    assert told is not None
    assert (told.state, told.rounds, told.rounds_done) == ("finished", 3, 3)


@pytest.mark.parametrize("name", ["rolora", "flora", "hetlora"])
def test_a_run_begun_by_the_version_before_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    """Its knobs are keys of the configuration, its state is of format 4."""
    values: dict[str, Value] = {"strategy__name": name, "lora__rank": "2"}
    whole = play(settings_of(tmp_path / "whole", rounds=4, **values))
    older = play(settings_of(tmp_path / "older", rounds=2, **values))
    config = tomllib.loads((older / "config.toml").read_text())
    table: Any = config.get("config", config)
    kept = {n: v for n, v in flatten_tables(table).items() if n != KNOBS}
    (older / "config.toml").write_text(tomli_w.dumps({**config, "config": {**kept, **RETIRED}}))
    for state in (older / "state").glob("round-*"):
        manifest = json.loads((state / "manifest.json").read_text())
        words = state / "state.json"
        manifest["memory"] = json.loads(words.read_text()) if words.is_file() else {}
        manifest["format"] = "bouquet-state-4"
        manifest["files"].pop("state.json", None)
        words.unlink(missing_ok=True)
        (state / "manifest.json").write_text(json.dumps(manifest))
    again = play(settings_of(older, rounds=4, resume=True, **values))
    assert rounds_of(again) == rounds_of(whole)
    assert adapter_bytes(again) == adapter_bytes(whole) is not None
