"""One line of rounds.jsonl: its type, its one reader and its one writer, and what its numbers mean.

A line is a JSON object; round 0 is the base model. It names its `schema`, and keys may be added
within one. Names end in their unit (`_bytes`, `_seconds`); a number that the server cannot know is
null, one that does not exist in a run is absent.
"""

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from core.errors import BouquetError, UsageError
from core.events import log, logfmt

FILE = "rounds.jsonl"
SCHEMA = "bouquet-round-1"


class Present(TypedDict):
    """A client that was there when the run began."""

    client: str
    rank: int
    num_examples: int


class HeldOut(TypedDict, total=False):
    """A model on the examples that no client trains on."""

    held_out_loss: float
    held_out_tokens: int
    held_out_accuracy: float
    held_out_macro_f1: float


class ClientRecord(HeldOut, total=False):
    """A client whose reply counted, or that trained alone."""

    client: str
    rank: int
    weight: float
    num_examples: int
    loss: float | None
    tokens: int
    steps: int
    examples_seen: int
    change_norm: float | None
    distribution_noise: float | None
    bytes_up: int
    bytes_down: int
    wire_error: float
    train_seconds: float
    peak_bytes: int


class EvaluationRecord(TypedDict, total=False):
    """A client's evaluation on what it holds out itself."""

    client: str
    loss: float
    tokens: int
    examples: int
    accuracy: float
    macro_f1: float


class FailureRecord(TypedDict):
    """A client that did not count, and why."""

    client: str
    reason: str


class RoundRecord(HeldOut, total=False):
    """A round, or the base model in round 0."""

    schema: str
    round: int
    base: str
    present: list[Present]
    train_loss: float
    train_tokens: int
    train_steps: int
    examples_seen: int
    aggregation_noise: float | None
    noise_relative_to_model: float | None
    ideal_change_norm: float | None
    mean_change_norm: float | None
    effective_rank: float | None
    global_rank: int
    bytes_up: int
    bytes_down: int
    evaluate_bytes_down: int
    broadcast_error: float
    version: str
    clients: list[ClientRecord]
    failures: list[FailureRecord]
    evaluation_failures: list[FailureRecord]
    spare: list[str]
    strays: dict[str, int]
    cosine: list[list[float]]
    cosine_sampled: list[str]
    module_noise: dict[str, float | None] | None
    module_distribution_noise: dict[str, float | None] | None
    client_held_out: list[EvaluationRecord]
    client_held_out_loss: float
    client_held_out_worst: float
    client_held_out_spread: float
    loss_before_aggregation: float
    trained_losses: dict[str, float]
    train_seconds: float
    aggregate_seconds: float
    telemetry_seconds: float
    evaluate_seconds: float
    seconds: float


def read_rounds(path: Path) -> list[RoundRecord]:
    """The whole lines of a rounds.jsonl, under the names of today; [] where there is none.

    A last line without its end is one that is being written, or whose writer was killed: it is left
    out. UsageError where any other line is no record of a round.
    """
    if not path.is_file():
        return []
    *whole, torn = path.read_bytes().split(b"\n")
    if torn:
        log.debug(logfmt("torn-line", path=path, bytes=len(torn)))
    records: list[dict[str, Any]] = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path} is damaged: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or type(record.get("round")) is not int:
            raise UsageError(f"{path} is damaged: line {number} is no record of a round")
        records.append(as_of_today(record))
    return cast(list[RoundRecord], records)


def append_round(path: Path, record: RoundRecord, advice: str = "") -> int:
    """Add one line, and wait until the disk has it; the length of the file afterwards.

    Raises BouquetError, which ends in the advice, where the disk does not take it.
    """
    line = json.dumps({"schema": SCHEMA, **record}, separators=(", ", ": "), allow_nan=False) + "\n"
    try:
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise BouquetError(
            f"{path} could not be written: {error.strerror}. Free some space, then {advice}"
        ) from error


def as_of_today(record: dict[str, Any]) -> dict[str, Any]:
    """A record under the names of today; those of an earlier Bouquet had others.

    Its clients' `delta_norm` was the norm of their change. Its `increment_norm` was that of all
    they trained, the start included: no norm of today, unless it was 0. Its aggregation noise
    stays as it is, see `Run.noise_as_before`.
    """
    clients = record.get("clients")
    if not clients or not all("delta_norm" in client for client in clients):
        return record
    renamed = [{**client, "change_norm": client["delta_norm"]} for client in clients]
    found = {**record, "clients": renamed}
    found["mean_change_norm"] = statistics.fmean(client["change_norm"] for client in renamed)
    if record.get("increment_norm") == 0.0:
        found["ideal_change_norm"] = 0.0
    return found


def value_of(record: Mapping[str, Any], key: str) -> Any:
    """What a record has under a key that is known only at run time; None where it has nothing."""
    return record.get(key)


LOWER, HIGHER, NEITHER = 1.0, -1.0, 0.0


@dataclass(frozen=True)
class Metric:
    """What a number of a record, or over all records of a run, means."""

    key: str
    words: str
    unit: str = ""
    better: float = NEITHER
    """LOWER, HIGHER or NEITHER: times it, less is better."""

    @property
    def best(self) -> str:
        """What its best value is called.

        >>> METRICS["held_out_loss"].best, METRICS["held_out_accuracy"].best
        ('lowest', 'highest')
        """
        return {LOWER: "lowest", HIGHER: "highest"}.get(self.better, "")

    @property
    def which_is_better(self) -> str:
        """The direction, for the end of a sentence; empty where there is none."""
        return {LOWER: "lower is better", HIGHER: "higher is better"}.get(self.better, "")


NATS, SHARE, NOISE = "nats per target", "share of examples", "relative to the ideal change"
LOSS, ACCURACY, MACRO_F1 = "held_out_loss", "held_out_accuracy", "held_out_macro_f1"
OWN_LOSS, OWN_ACCURACY = "client_held_out_loss", "client_accuracy_mean"
METRICS = {
    metric.key: metric
    for metric in (
        Metric("train_loss", "training loss", NATS, LOWER),
        Metric("train_tokens", "tokens trained on", "tokens"),
        Metric(LOSS, "held-out loss", NATS, LOWER),
        Metric(ACCURACY, "held-out accuracy", SHARE, HIGHER),
        Metric(MACRO_F1, "held-out macro-F1", "mean over classes", HIGHER),
        Metric(OWN_LOSS, "the clients' own held-out loss", NATS, LOWER),
        Metric("loss_before_aggregation", "loss before aggregation", NATS, LOWER),
        Metric("mean_change_norm", "size of change", "Frobenius norm"),
        Metric("aggregation_noise", "aggregation noise", NOISE, LOWER),
        Metric("noise_relative_to_model", "noise beside the model", "relative to it", LOWER),
        Metric("ideal_change_norm", "size of the ideal change", "Frobenius norm"),
        Metric("effective_rank", "effective rank", "directions"),
        Metric("global_rank", "rank", "directions"),
        Metric("bytes_up", "bytes up", "bytes", LOWER),
        Metric("bytes_down", "bytes down", "bytes", LOWER),
        Metric("seconds", "seconds", "seconds", LOWER),
        Metric(OWN_ACCURACY, "mean accuracy of the clients", SHARE, HIGHER),
        Metric("client_loss_mean", "mean loss of the clients", NATS, LOWER),
        Metric("client_macro_f1_mean", "mean macro-F1 of the clients", "mean", HIGHER),
        Metric("worst_client_loss", "largest loss of a client", NATS, LOWER),
        Metric("worst_client_accuracy", "least accuracy of a client", SHARE, HIGHER),
        Metric("worst_client_macro_f1", "least macro-F1 of a client", "mean", HIGHER),
    )
}
"""Key -> what it means: of records, and below of what is taken over the clients of a run."""
PER_ROUND = tuple(METRICS)[: tuple(METRICS).index("seconds") + 1]
"""The numbers of one round, in the order of tables."""
