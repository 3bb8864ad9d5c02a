"""A comparison's folder: runs of the same job under different names and seeds.

comparisons/001/comparison.json        what is compared, what is done, what failed and why
comparisons/001/runs/NAME/seed-N/      one run, as `bouquet simulate` writes it
comparisons/001/tuning/NAME/rate-R/    one trial of a learning rate, with --tune-rates
comparisons/001/results.json, .csv     every number of every round
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import BouquetError, UsageError
from core.files import write_durably
from journal.data_files import refuse_changed_data
from journal.record import LOSS
from journal.results import Run, read_run
from journal.run_folder import versions
from settings.keys import Value
from simulations.tuning import Trial, Tuning, tuning_seed

FILE = "comparison.json"
FORMAT = "bouquet-comparison-2"
READABLE = (FORMAT, "bouquet-comparison-1")
"""Formats that a page can be drawn from. The older one has runs under keys of another meaning."""
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
    rate: float | None = None
    """Where it is a trial: the learning rate that it tries."""

    def __str__(self) -> str:
        if self.rate is not None:
            return f"tuning {self.name}, rate {self.rate:g}"
        return f"{self.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """Where it lies below the folder of runs, or of trials."""
        if self.rate is not None:
            return f"{self.name}/rate-{self.rate:g}"
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
    rates: list[float] = field(default_factory=list)
    """The learning rates that each method chooses from; empty: all take that of `config`."""
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Key -> what a trial came to: metric, loss (null: none), failure."""

    def entries(self) -> list[Entry]:
        """All runs, those of one seed together, so that each seed is complete before the next."""
        first = int(self.config["seed"])
        return [
            Entry(name, seed) for seed in range(first, first + self.seeds) for name in self.names
        ]

    def trial_entries(self, name: str) -> list[Entry]:
        """The trials of one method, done or not; none without rates."""
        seed = tuning_seed(int(self.config["seed"]))
        return [Entry(name, seed, rate) for rate in self.rates]

    def tuning(self, name: str) -> Tuning | None:
        """What the trials of a method came to; None before all are done, and without rates."""
        entries = self.trial_entries(name)
        found = [self.trials[entry.key] for entry in entries if entry.key in self.trials]
        if not entries or len(found) < len(entries):
            return None
        trials = tuple(
            Trial(rate, each["loss"], each["failure"])
            for rate, each in zip(self.rates, found, strict=True)
        )
        metrics = [each["metric"] for each in found if each["loss"] is not None]
        return Tuning(entries[0].seed, metrics[0] if metrics else LOSS, trials)

    def folder(self, entry: Entry) -> Path:
        """Where this run lies."""
        return self.path / ("runs" if entry.rate is None else "tuning") / entry.key

    def tried(self, entry: Entry, metric: str, loss: float | None, failure: str | None) -> None:
        """Remember what a trial came to; it is not repeated, so that its choice stands."""
        self.trials[entry.key] = {"metric": metric, "loss": loss, "failure": failure}
        self.save()

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
            "rates": self.rates,
            "trials": self.trials,
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
        tuning = self.tuning(entry.name)
        how = None if tuning is None else tuning.as_dict()
        if (folder / "config.toml").is_file():
            return replace(read_run(folder), name=entry.name, failure=failure, tuning=how)
        reason = failure or "not yet run"
        config = {**self.config, "seed": entry.seed, "strategy.name": entry.name}
        return Run(entry.name, entry.seed, folder, config, versions(), [], reason, how)

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
    rates: Sequence[float] = (),
    data: Mapping[str, Any] | None = None,
) -> Comparison:
    """The comparison in this folder, begun or gone on with.

    What it compares may grow: names, seeds and the budget are added to those it has. UsageError
    where the folder holds something else or was begun by another version, or where the
    configuration, the rates to choose from or the data differ.

    data: each file with its hash, as `data_record` makes them.
    """
    if is_comparison(path):
        kept = load_comparison(path, to_go_on=True)
        if list(rates) != kept.rates:
            was, now = (_listed(each) for each in (kept.rates, rates))
            raise UsageError(
                f"{path} compares runs with {was}, and now it is {now}. All methods of a "
                "comparison choose from the same rates: give it the same, or choose another "
                "--output"
            )
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
    comparison = Comparison(
        path, list(names), seeds, dict(config), equal_bytes, data=data or {}, rates=list(rates)
    )
    comparison.save()
    return comparison


def _listed(rates: Sequence[float]) -> str:
    return f"--tune-rates {','.join(f'{r:g}' for r in rates)}" if rates else "no --tune-rates"


def is_comparison(path: Path) -> bool:
    """Whether this folder holds a comparison."""
    return (path / FILE).is_file()


def load_comparison(path: Path, to_go_on: bool = False) -> Comparison:
    """The comparison in this folder; UsageError where its file is none of ours.

    to_go_on: refuse one that another version began, which can be read and not more.
    """
    try:
        kept: dict[str, Any] = json.loads((path / FILE).read_bytes())
        found = kept.pop("format")
        if found not in READABLE:
            raise ValueError(f"its format is {found!r}, expected {FORMAT}")
        comparison = Comparison(path=path, **kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / FILE} cannot be read: {error}") from error
    if to_go_on and found != FORMAT:
        raise UsageError(
            f"{path} was begun by another version of Bouquet and cannot be gone on with by this "
            f"one (its format is {found}, expected {FORMAT}): choose another --output. What it "
            f"holds can be read: `{shlex.join(['bouquet', 'report', str(path)])}` draws its runs"
        )
    return comparison


def read_comparison(path: Path) -> list[Run]:
    """All runs of the comparison in this folder."""
    return list(load_comparison(path).runs())
