"""The run of a deployment once more, in one process, with the same clients there and missing.

    python -m tools.rehearsal.replay FOLDER     reads FOLDER/replay.json, plays FOLDER/run

replay.json: {"config": tables of the run, "sites": {name: node config},
              "roster": who was there when the run began,
              "asked": who was asked to train, for each round from the first,
              "failed": [[round, name], ...]}

While the same clients are there the run goes on in one piece. Where others come it is stopped and
taken up with these: clients that join by themselves do so a round later.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from server.admission import Rejection
from server.app import app as server_app
from server.progress import LogObserver, observe_run
from settings.keys import Value, flatten, flatten_tables
from settings.run import run_settings
from simulations.grid import FIRST_CLIENT_NODE, RUN_ID, SERVER_NODE, InProcessGrid
from tools.rehearsal.quick_client import app as client_app


class StopError(Exception):
    """From here on other clients are there."""


class Until(LogObserver):
    """Stops the run once this round is committed."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def round_finished(self, record: Mapping[str, Any], rejected: list[Rejection]) -> None:
        """The end, perhaps."""
        if record["round"] == self._last:
            raise StopError


class SomeOfThem(InProcessGrid):
    """The in-process grid with only some of its clients connected."""

    there: frozenset[int] = frozenset()

    def get_node_ids(self) -> Iterable[int]:
        """Of those that are there."""
        return sorted(self.there)


def stretches(told: Mapping[str, Any]) -> list[tuple[list[str], int]]:
    """(who is there, the last round of theirs): -1 where they stay to the end.

    >>> stretches({"roster": ["a"], "asked": [["a"], ["a", "b"], ["a", "b"]]})
    [(['a'], 1), (['a', 'b'], -1)]
    """
    who = [sorted(names) for names in (told.get("roster", told["asked"][0]), *told["asked"])]
    ends = [k for k in range(len(who) - 1) if who[k] != who[k + 1]]
    return [(who[k], k) for k in ends] + [(who[-1], -1)]


def replay(folder: Path) -> None:
    """Play it."""
    told = json.loads((folder / "replay.json").read_text())
    failed = {(number, name) for number, name in told["failed"]}

    def answer(message: Message, context: Context) -> Message:
        instruction: Any = message.content.get("instruction", {})
        asked = (instruction.get("round"), context.node_config["name"])
        if message.metadata.message_type != "query" and asked in failed:
            raise RuntimeError("failed")
        return client_app(message, context)

    names = sorted(told["sites"])
    nodes = {name: FIRST_CLIENT_NODE + k for k, name in enumerate(names)}
    configs = [
        {**told["sites"][name], "name": name, "cache-path": str(folder / "caches" / name)}
        for name in names
    ]
    where: dict[str, Value] = {
        "output": str(folder / "run"),
        "resume": True,
        "clients.min-replies": 1,
    }
    config = flatten(run_settings(flatten_tables(told["config"]), where))
    for there, last in stretches(told):
        grid = SomeOfThem(answer, len(names), config, node_configs=configs)  # type: ignore[arg-type]
        grid.there = frozenset(nodes[name] for name in there)
        context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(config))
        with observe_run(Until(last)), contextlib.suppress(StopError):
            server_app(grid, context)


if __name__ == "__main__":
    replay(Path(sys.argv[1]))
