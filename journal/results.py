"""Runs as they lie in their folders, and what is taken from them: final metrics and tables.

A run's folder holds config.toml and rounds.jsonl; a comparison's folder holds runs and, in
comparison.json, their order and why some of them failed.
"""

import csv
import io
import json
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import BouquetError, UsageError
from core.files import write_durably
from journal.record import (
    ACCURACY,
    FILE,
    LOSS,
    METRICS,
    OWN_ACCURACY,
    OWN_LOSS,
    PER_ROUND,
    RoundRecord,
    read_rounds,
    value_of,
)
from journal.run_folder import read_config
from settings.keys import Value

CENTRAL, LOCAL = "central", "local"
REFERENCES = (CENTRAL, LOCAL)
REFERENCE_KEY = "reference"
"""Beside [config] in a config.toml: the name of the reference, where a run is one."""


@dataclass(frozen=True)
class Run:
    """One run: a strategy or a reference with one seed."""

    name: str
    """The strategy's name, or `central` or `local`."""
    seed: int
    folder: Path
    config: Mapping[str, Value]
    """Flat keys of its config.toml."""
    versions: Mapping[str, str]
    rounds: Sequence[RoundRecord]
    """The records of rounds.jsonl, round 0 first; may be empty."""
    failure: str | None = None
    """Why it was refused or ended early."""
    tuning: Mapping[str, Any] | None = None
    """How its method's learning rate was chosen, as in results.json; None where none was."""

    @property
    def noise_as_before(self) -> bool:
        """Whether an earlier Bouquet wrote it, whose noise is relative to the whole model."""
        trained = [record for record in self.rounds if "aggregation_noise" in record]
        return any("noise_relative_to_model" not in record for record in trained)


@dataclass(frozen=True)
class Spread:
    """One final metric over the seeds of a strategy."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def least(self) -> float:
        """The smallest value of any seed."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest value of any seed."""
        return max(self.values)


@dataclass(frozen=True)
class SummaryRow:
    """One strategy or reference over all its seeds."""

    name: str
    seeds: tuple[int, ...]
    """The seeds whose runs are whole; `metrics` are over these."""
    metrics: Mapping[str, Spread]
    """Keys as in `final_metrics`; absent where no run has that metric."""
    failures: Mapping[int, str]
    """Seed -> why its run was refused or ended early."""


def read_run(folder: Path) -> Run:
    """The run in this folder; UsageError where there is none."""
    path = folder / "config.toml"
    if not path.is_file():
        raise UsageError(
            f"expected a run's folder, but there is no config.toml in {folder}: name a folder that "
            "`bouquet simulate` or `bouquet compare` wrote, such as runs/flora-001"
        )
    config = read_config(path)
    tables = tomllib.loads(path.read_text())
    name = tables.get(REFERENCE_KEY, config.get("strategy.name"))
    if not isinstance(name, str):
        raise UsageError(f"{path} names no strategy (strategy.name): it is not a run's config.toml")
    return Run(
        name=name,
        seed=int(config.get("seed", 0)),
        folder=folder,
        config=config,
        versions={key: str(value) for key, value in tables.get("versions", {}).items()},
        rounds=read_rounds(folder / FILE),
    )


def last_value(run: Run, key: str) -> Any:
    """The newest value of this key after any training; None where no round has it."""
    trained = [record for record in run.rounds if record["round"] > 0]
    values = (value_of(record, key) for record in reversed(trained))
    return next((value for value in values if value is not None), None)


def final_metrics(run: Run) -> dict[str, float]:
    """The last values of a run and its totals; a key is absent where the run has no such metric.

    `client_held_out_loss` is the mean over the clients' own held-out parts, weighted by tokens.
    `worst_client_*`, `client_*_deviation` and `client_*_mean` are over the clients' own held-out
    parts, each client counting once; bytes and seconds are sums over all rounds, and
    `mean_change_norm` is the mean over rounds.
    """
    names = ("train_loss", *PER_ROUND[2:7], "aggregation_noise")
    found = {name: last_value(run, name) for name in names}
    trained = [record for record in run.rounds if record["round"] > 0]
    found |= {
        name: sum(value_of(record, name) or 0 for record in trained)
        for name in ("bytes_up", "bytes_down", "seconds")
    }
    norms = [record.get("mean_change_norm") for record in trained]
    changes = [norm for norm in norms if norm is not None]
    found["mean_change_norm"] = statistics.fmean(changes) if changes else None
    found["bytes"] = found["bytes_up"] + found["bytes_down"]
    found["rounds"] = max((record["round"] for record in run.rounds), default=0)
    clients = last_value(run, "client_held_out") or []
    for metric, worst in (("loss", max), ("accuracy", min), ("macro_f1", min)):
        values = [client[metric] for client in clients if client.get(metric) is not None]
        if values:
            found[f"worst_client_{metric}"] = worst(values)
            found[f"client_{metric}_deviation"] = statistics.pstdev(values)
            found[f"client_{metric}_mean"] = statistics.fmean(values)
    return {name: value for name, value in found.items() if value is not None}


def headline_metric(rows: Sequence[SummaryRow]) -> str:
    """What rows are ranked by: held-out accuracy where there is one, else held-out loss."""
    named = {name for row in rows for name in row.metrics}
    return ACCURACY if {ACCURACY, OWN_ACCURACY} & named else LOSS


def summary_rows(runs: Sequence[Run]) -> list[SummaryRow]:
    """One row a strategy over its seeds, the best first; those without a whole run come last.

    A method with personal models has no global one to evaluate. Such rows come after the others,
    by the clients' mean on their own held-out parts, of losses weighted by tokens, of accuracies
    each client counting once: two losses on different examples do not compare.
    """
    rows = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        whole = [run for run in own if run.failure is None]
        finals = [final_metrics(run) for run in whole]
        keys = dict.fromkeys(key for final in finals for key in final)
        metrics = {key: Spread(tuple(f[key] for f in finals if key in f)) for key in keys}
        failures = {run.seed: run.failure for run in own if run.failure is not None}
        rows.append(SummaryRow(name, tuple(run.seed for run in whole), metrics, failures))
    best = headline_metric(rows)
    personal = OWN_LOSS if best == LOSS else OWN_ACCURACY

    def order(row: SummaryRow) -> tuple[int, float]:
        for group, name in enumerate((best, personal)):
            if name in row.metrics:
                return group, METRICS[name].better * row.metrics[name].mean
        return 2, 0.0

    return sorted(rows, key=order)


def round_rows(run: Run) -> Iterator[dict[str, Any]]:
    """One flat row a round: its own numbers, and bytes and seconds so far."""
    sums = {"cumulative_bytes_up": 0, "cumulative_bytes_down": 0, "cumulative_seconds": 0.0}
    for record in run.rounds:
        if record["round"] > 0:
            sums = {
                name: total + (value_of(record, name.removeprefix("cumulative_")) or 0)
                for name, total in sums.items()
            }
        row: dict[str, Any] = {"round": record["round"]}
        values = {name: value_of(record, name) for name in PER_ROUND}
        yield row | {name: value for name, value in values.items() if value is not None} | sums


def write_results(folder: Path, runs: Sequence[Run]) -> None:
    """Write results.json and results.csv: every round of every run, and what they have in common.

    Both hold the numbers of rounds.jsonl as they are.
    """
    objects = []
    for run in runs:
        objects.append(
            {
                "name": run.name,
                "seed": run.seed,
                "folder": _relative(run.folder, folder),
                "failure": run.failure,
                "config": _not_common(run.config, [other.config for other in runs]),
                "final": final_metrics(run),
                "client_held_out": last_value(run, "client_held_out"),
                "rounds": list(round_rows(run)),
            }
        )
    document = {
        "runs": objects,
        "config": _common([run.config for run in runs]),
        "versions": _common([run.versions for run in runs]),
        "tuning": {run.name: dict(run.tuning) for run in runs if run.tuning is not None},
    }
    table = io.StringIO()
    cumulative = ("cumulative_bytes_up", "cumulative_bytes_down", "cumulative_seconds")
    columns = ["name", "seed", "round", *PER_ROUND, *cumulative]
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerows({"name": run.name, "seed": run.seed, **row} for row in round_rows(run))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "results.json", (json.dumps(document, indent=1) + "\n").encode())
        write_durably(folder / "results.csv", table.getvalue().encode())
    except OSError as error:
        raise BouquetError(
            f"the results cannot be written to {folder}: {error.strerror}. The runs are whole; "
            "free some space or choose another --output, and give the same command again"
        ) from error


def _common(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of the non-empty ones agree on."""
    filled = [mapping for mapping in mappings if mapping]
    if not filled:
        return {}
    return {
        name: value
        for name, value in filled[0].items()
        if all(name in other and other[name] == value for other in filled)
    }


def _not_common(mapping: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    common = _common(others)
    return {name: value for name, value in mapping.items() if name not in common}


def _relative(path: Path, folder: Path) -> str:
    resolved = path.resolve()
    root = folder.resolve()
    return str(resolved.relative_to(root)) if resolved.is_relative_to(root) else str(path)
