"""A comparison's folder: runs of the same job under different names and seeds.

comparisons/001/comparison.json        what is compared, what is done, what failed and why
comparisons/001/runs/NAME/seed-N/      one run, as `bouquet simulate` writes it
comparisons/001/results.json, .csv     every number of every round
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import BouquetError, UsageError
from server.run_folder import versions
from server.state import write_durably
from settings.keys import Value
from simulations.data_record import refuse_changed_data
from simulations.results import Run, read_run

FILE = "comparison.json"
FORMAT = "bouquet-comparison-1"
MAY_DIFFER = (
    "output",
    "resume",
    "strategy.name",
    "clients.timeout-seconds",
    "model.device",
    "data.path",
    "data.evaluation",
    "data.chat-template-file",
)


@dataclass(frozen=True)
class Entry:
    """One run of a comparison, done or not."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Where it lies below the folder of runs."""
        return f"{self.name}/seed-{self.seed}"


@dataclass
class Comparison:
    """What comparison.json says."""

    path: Path
    names: list[str]
    seeds: int
    config: Mapping[str, Value]
    """What all runs have in common; `seed` is the first one's."""
    equal_bytes: bool = False
    done: list[str] = field(default_factory=list)
    """Keys of the runs that ended as they should."""
    failures: dict[str, str] = field(default_factory=dict)
    """Key -> why a run was refused or ended early."""
    spent: dict[str, int] = field(default_factory=dict)
    """Key -> the budget of bytes that a run was extended to."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Each file of the data with its hash, as in a run's data.json."""

    def entries(self) -> list[Entry]:
        """All runs, those of one seed together, so that each seed is complete before the next."""
        first = int(self.config["seed"])
        return [
            Entry(name, seed) for seed in range(first, first + self.seeds) for name in self.names
        ]

    def folder(self, entry: Entry) -> Path:
        """Where this run lies."""
        return self.path / "runs" / entry.key

    def finished(self, entry: Entry) -> None:
        """Remember that the run is whole."""
        self.done = [*dict.fromkeys([*self.done, entry.key])]
        self.failures.pop(entry.key, None)
        self.save()

    def failed(self, entry: Entry, reason: str) -> None:
        """Remember why the run was refused or ended early."""
        self.failures[entry.key] = reason
        self.save()

    def save(self) -> None:
        """Write comparison.json, whole or not at all."""
        document = {
            "format": FORMAT,
            "names": self.names,
            "seeds": self.seeds,
            "equal_bytes": self.equal_bytes,
            "done": self.done,
            "failures": self.failures,
            "spent": self.spent,
            "config": dict(self.config),
            "data": dict(self.data),
        }
        scratch = self.path / f".writing-{FILE}"
        try:
            write_durably(scratch, (json.dumps(document, indent=1) + "\n").encode())
            scratch.rename(self.path / FILE)
        except OSError as error:
            raise BouquetError(
                f"{self.path / FILE} could not be written: {error.strerror}. Free some space and "
                "give the same command again"
            ) from error

    def run(self, entry: Entry) -> Run:
        """The run as it is now; one that never began has no records."""
        failure, folder = self.failures.get(entry.key), self.folder(entry)
        if (folder / "config.toml").is_file():
            return replace(read_run(folder), name=entry.name, failure=failure)
        reason = failure or "not yet run"
        config = {**self.config, "seed": entry.seed, "strategy.name": entry.name}
        return Run(entry.name, entry.seed, folder, config, versions(), [], reason)

    def runs(self) -> Iterator[Run]:
        """All runs, in the order of names."""
        for entry in sorted(self.entries(), key=lambda entry: self.names.index(entry.name)):
            run = self.run(entry)
            whole = entry.key in self.done or run.failure is not None
            yield run if whole else replace(run, failure="not yet finished")


def open_comparison(
    path: Path,
    names: Sequence[str],
    seeds: int,
    equal_bytes: bool,
    config: Mapping[str, Value],
    data: Mapping[str, Any] | None = None,
) -> Comparison:
    """The comparison in this folder, begun or gone on with.

    What it compares may grow: names, seeds and the budget are added to those it has. UsageError
    where the folder holds something else, or where the configuration or the data differ.

    data: each file with its hash, as `data_record` makes them.
    """
    if is_comparison(path):
        kept = load_comparison(path)
        for name in sorted({*kept.config, *config}.difference(MAY_DIFFER)):
            if kept.config.get(name) != config.get(name):
                raise UsageError(
                    f"{path} compares runs with {name} = {kept.config.get(name)!r}, and now it is "
                    f"{config.get(name)!r}. All runs of a comparison share their configuration: "
                    "give it the same value, or choose another --output"
                )
        if data is not None:
            refuse_changed_data(kept.data, data, str(path))
            kept.data = data
        kept.names = [*dict.fromkeys([*kept.names, *names])]
        kept.seeds = max(kept.seeds, seeds)
        kept.equal_bytes = kept.equal_bytes or equal_bytes
        kept.save()
        return kept
    try:
        if path.exists() and any(path.iterdir()):
            raise UsageError(
                f"{path} exists and holds no comparison (no {FILE}): choose another --output, or "
                "leave --output out for a new number"
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {os.strerror(error.errno or 0)}") from error
    comparison = Comparison(path, list(names), seeds, dict(config), equal_bytes, data=data or {})
    comparison.save()
    return comparison


def is_comparison(path: Path) -> bool:
    """Whether this folder holds a comparison."""
    return (path / FILE).is_file()


def load_comparison(path: Path) -> Comparison:
    """The comparison in this folder; UsageError where its file is none of ours."""
    try:
        kept: dict[str, Any] = json.loads((path / FILE).read_bytes())
        if kept.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return Comparison(path=path, **kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / FILE} cannot be read: {error}") from error


def read_comparison(path: Path) -> list[Run]:
    """All runs of the comparison in this folder."""
    return list(load_comparison(path).runs())
