"""What a run did so far, read from its rounds.jsonl: also while it goes on.

Who took part in each round, who failed and why, how long it took and how much was sent.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UsageError
from server.run_folder import read_config
from strategies.registry import make_strategy

Record = Mapping[str, Any]


@dataclass
class SiteTotals:
    """One site over all rounds so far."""

    site: str
    rank: int | None = None
    rounds: list[int] = field(default_factory=list)
    """Those it took part in."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """(round, reason) of those it did not, though it was asked."""
    num_examples: int = 0
    train_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Status:
    """A run, as far as its folder tells."""

    folder: Path
    records: Sequence[Record]
    """Whole lines of rounds.jsonl, round 0 first."""
    wanted: int
    """Rounds that its configuration asks for."""
    strategy: str
    finished: bool
    personal: bool
    """Each client has a model of its own, so there is no global one to export."""
    idle_seconds: float
    """Since anything was written."""

    @property
    def done(self) -> int:
        """The newest round."""
        return int(self.records[-1]["round"]) if self.records else 0

    @property
    def own_losses(self) -> bool:
        """Whether the held-out losses of its rounds are the clients', each of its own model."""
        known = {key for record in self.records if record["round"] > 0 for key in record}
        return "held_out_loss" not in known and (self.personal or "client_held_out_loss" in known)

    def sites(self) -> list[SiteTotals]:
        """Every site that was ever asked, by name."""
        found: dict[str, SiteTotals] = {}
        for record in self.records:
            for client in record.get("clients", []):
                name = str(client["client"])
                totals = found.setdefault(name, SiteTotals(name))
                totals.rank = client["rank"]
                totals.rounds.append(int(record["round"]))
                totals.num_examples = client["num_examples"]
                totals.train_seconds += client["train_seconds"]
                totals.bytes_up += client["bytes_up"]
                totals.bytes_down += client["bytes_down"]
            failures = record.get("failures", []) + record.get("evaluation_failures", [])
            for failure in failures:
                name = str(failure["client"])
                totals = found.setdefault(name, SiteTotals(name))
                totals.failures.append((int(record["round"]), str(failure["reason"])))
        return [found[name] for name in sorted(found)]

    def next_step(self, link: str = "LINK") -> str:
        """What an operator does now."""
        if self.finished and self.personal:
            return (
                f"finished: {self.strategy} has a model for each client, and no global adapter; "
                f"bouquet report {self.folder} draws the run"
            )
        if self.finished:
            return (
                f"finished: the adapter is in {self.folder}/adapter; bouquet report {self.folder} "
                "draws the run"
            )
        begun = f"round {self.done + 1} of {self.wanted}" if self.records else "the first answers"
        return (
            f"waiting for {begun}; nothing was written for {_in_words(self.idle_seconds)}. "
            f"flwr list {link} says whether the run goes on; if not, the flwr run command that "
            "started it, with resume=true, takes it up after its last round"
        )


def read_status(folder: Path) -> Status:
    """Read a run's folder; UsageError where it is none."""
    if not (folder / "config.toml").is_file():
        raise UsageError(
            f"{folder} is no folder of a run: it has no config.toml. A deployed run lies below the "
            "SuperLink's folder: coordinator/runs/NAME"
        )
    config = read_config(folder / "config.toml")
    records = read_records(folder / "rounds.jsonl")
    wanted, strategy = int(config["rounds"]), str(config["strategy.name"])
    personal = make_strategy(strategy).properties.personal  # has no global model to export
    written = max(path.stat().st_mtime for path in folder.iterdir())
    done = int(records[-1]["round"]) if records else 0
    return Status(
        folder=folder,
        records=records,
        wanted=wanted,
        strategy=strategy,
        finished=bool(records) and done >= wanted and (personal or (folder / "adapter").is_dir()),
        personal=personal,
        idle_seconds=max(0.0, time.time() - written),
    )


def read_records(log: Path) -> list[Record]:
    """The whole lines of a rounds.jsonl, without one that is being written."""
    if not log.exists():
        return []
    *whole, _ = log.read_text().split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UsageError(f"{log} is damaged: {error}") from error


def _in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
