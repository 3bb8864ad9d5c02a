"""Whole rounds with a stranger among the clients: what it answers changes nothing but the log.

The yardstick is a run in which the same client crashed instead: every file of the final state, and
the adapter, must have the same bytes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from journal.run_folder import RunFolder
from server.rounds import run_rounds
from settings.keys import Value, flatten
from simulations.grid import FIRST_CLIENT_NODE, InProcessGrid
from tests.fake_clients import fake_app, settings_of
from tests.server.malformed_replies import MALFORMED_REPLIES, OUT_OF_LINE
from tests.server.spoiling import Bad

BAD_REPLIES = MALFORMED_REPLIES | OUT_OF_LINE
HONEST = 2
ROUNDS = 2
RANK = 2


class StrangersFirst(InProcessGrid):
    """Replies arrive with those of all clients but the honest first, or last."""

    first = True

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._in_order(super().pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._in_order(super().send_and_receive(messages, timeout=timeout))

    def _in_order(self, replies: Iterable[Message]) -> list[Message]:
        """Sorted before anyone sees one of them; sorting what is sorted changes nothing."""
        return sorted(replies, key=lambda reply: is_honest(reply) == self.first)


class StrangersLast(StrangersFirst):
    first = False


ORDERS = {"arrives first": StrangersFirst, "arrives last": StrangersLast}


def is_honest(reply: Message) -> bool:
    return reply.metadata.src_node_id < FIRST_CLIENT_NODE + HONEST


def app_with(strangers: Sequence[Bad | None]) -> ClientApp:
    """Two honest clients, then one for each of these; None crashes when it is to train."""

    def tamper(client: int, message: Message, reply: Message) -> Message | None:
        if client < HONEST or "adapter" not in reply.content:
            return reply
        make = strangers[client - HONEST]
        if make is None:
            return None
        bad: Any = make(reply.content, message)
        return Message(bad, reply_to=message)

    return fake_app(tamper=tamper)


def play(
    folder: Path,
    strangers: Sequence[Bad | None],
    grid: type[InProcessGrid] = InProcessGrid,
    **values: Value,
) -> Path:
    settings = settings_of(
        folder,
        clients__count=HONEST + len(strangers),
        lora__rank=str(RANK),
        rounds=ROUNDS,
        **values,
    )
    return run_rounds(
        grid(app_with(strangers), settings.clients.count, flatten(settings)), settings
    )


def left_behind(folder: Path) -> dict[str, bytes | str]:
    """What the run ends with: every file of its states, and the adapter; no word of the log."""
    files: dict[str, bytes | str] = {}
    for path in sorted([*(folder / "state").rglob("*"), *(folder / "adapter").iterdir()]):
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            del manifest["log_bytes"]  # it names the reasons
            files[str(path.relative_to(folder))] = json.dumps(manifest)
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


@cache
def without_them(count: int, **values: Value) -> dict[str, bytes | str]:
    """What is left of a run in which so many clients crashed when they were to train."""
    with TemporaryDirectory() as folder:
        return left_behind(play(Path(folder, "run"), [None] * count, **values))


def assert_only_the_log_knows(folder: Path, names: Sequence[str], **values: Value) -> None:
    """The strangers are named in every round with their reasons; else they were never there."""
    records = RunFolder(folder).rounds()[1:]
    assert len(records) == ROUNDS
    for record in records:
        assert [client["client"] for client in record["clients"]] == ["client-00", "client-01"]
        failures = {failure["client"]: failure["reason"] for failure in record["failures"]}
        assert list(failures) == [f"client-{HONEST + k:02d}" for k in range(len(names))]
        for name, reason in zip(names, failures.values(), strict=True):
            assert re.search(BAD_REPLIES[name][1], reason), f"{name}: {reason}"
    assert left_behind(folder) == without_them(len(names), **values)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_malformed_reply_leaves_no_trace_but_in_the_log(
    name: str, order: str, tmp_path: Path
) -> None:
    folder = play(tmp_path / "run", [BAD_REPLIES[name][0]], ORDERS[order])
    assert_only_the_log_knows(folder, [name])


@pytest.mark.parametrize("strategy", ["flora", "flora-warm", "fedavg", "flexlora"])
@pytest.mark.parametrize("order", ORDERS)
def test_all_malformed_replies_at_once_leave_no_trace_but_in_the_log(
    order: str, strategy: str, tmp_path: Path
) -> None:
    strangers = [bad for bad, _ in BAD_REPLIES.values()]
    folder = play(tmp_path / "run", strangers, ORDERS[order], strategy__name=strategy)
    assert_only_the_log_knows(folder, list(BAD_REPLIES), strategy__name=strategy)


def test_an_honest_third_client_does_leave_a_trace(tmp_path: Path) -> None:
    """The yardstick measures something: had its reply counted, the bytes would differ."""
    folder = play(tmp_path / "run", [lambda honest, message: honest])
    record = RunFolder(folder).rounds()[-1]
    assert len(record["clients"]) == 3
    assert record["failures"] == []
    left, without = left_behind(folder), without_them(1)
    assert left.keys() == without.keys()
    assert left["adapter/adapter_model.safetensors"] != without["adapter/adapter_model.safetensors"]


def test_the_orders_are_what_they_are_called(tmp_path: Path) -> None:
    for grid in ORDERS.values():
        settings = settings_of(tmp_path, clients__count=4, lora__rank="2")
        table = grid(app_with([None, None]), 4, flatten(settings))

        def of_all_clients(table: InProcessGrid = table) -> list[Message]:
            return [
                Message(RecordDict({"ask": ConfigRecord()}), dst_node_id=node, message_type="query")
                for node in table.get_node_ids()
            ]

        wanted = [False, False, True, True] if grid.first else [True, True, False, False]
        heard = [is_honest(reply) for reply in table.send_and_receive(of_all_clients())]
        assert heard == wanted
        pulled = table.pull_messages(table.push_messages(of_all_clients()))
        assert [is_honest(reply) for reply in pulled] == wanted
