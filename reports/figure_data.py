"""What figures are drawn from: strategies in a fixed order, their numbers over rounds and seeds.

A record may lack any key, and may hold nothing or no finite number in its place.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import listing
from journal.record import RoundRecord
from journal.results import CENTRAL, LOCAL, REFERENCES, Run
from reports.figure_style import HUES, REFERENCE
from strategies.registry import promises, strategy_names

Dash = tuple[float, ...]
DASHES: tuple[Dash, ...] = ((), (5.0, 2.0), (1.6, 1.6))
MARKERS = "os^DvPX"
ABOUT_REFERENCES = {
    CENTRAL: ("Central LoRA", "reference: one adapter on the pooled data", (7.0, 3.0)),
    LOCAL: ("Local only", "reference: each client alone, nothing shared", (7.0, 2.0, 1.5, 2.0)),
}


@dataclass(frozen=True, eq=False)
class Series:
    """A strategy or a reference with all its seeds, and how it looks in every figure."""

    number: int
    name: str
    title: str
    source: str
    colour: str
    dash: Dash
    marker: str
    reference: bool
    personal: bool
    """Each client has a model of its own, so there is no global one."""
    runs: tuple[Run, ...]

    @property
    def drawn(self) -> list[Run]:
        """The whole runs; where none is whole, those that came at least to some rounds."""
        whole = [run for run in self.runs if run.failure is None and run.rounds]
        return whole or [run for run in self.runs if run.rounds]

    def gid(self, part: str) -> str:
        """What a part of a figure that belongs to this series is called."""
        return f"series-{self.number}-{part}"


@dataclass(frozen=True)
class Curve:
    """A line over rounds: the mean over seeds, between the least and the most."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]

    def beyond_zero(self) -> "Curve":
        """The part that a logarithmic x axis can show."""
        kept = [place for place, x in enumerate(self.x) if x > 0.0]
        columns = (self.x, self.mean, self.low, self.high)
        return Curve(*([column[place] for place in kept] for column in columns))


def line_up(runs: Sequence[Run]) -> list[Series]:
    """The strategies in the registry's order, others after them, references last."""
    known = strategy_names()
    names = list(dict.fromkeys(run.name for run in runs))
    listed = len(known)

    def order(name: str) -> tuple[bool, int]:
        base = _base(name)
        return base in REFERENCES, known.index(base) if base in known else listed

    found = []
    for number, name in enumerate(sorted(names, key=order)):
        base = _base(name)
        suffix = name.removeprefix(base)
        title, source, personal = name, "", False
        colour = HUES[number % len(HUES)][0]
        dash = DASHES[number // len(HUES) % len(DASHES)]
        if base in REFERENCES:
            title, source, dash = ABOUT_REFERENCES[base]
            colour, title = REFERENCE, title + suffix
        elif (properties := promises(base)) is not None:
            title, source = properties.title + suffix, properties.source
            personal = properties.personal
        found.append(
            Series(
                number=number,
                name=name,
                title=title,
                source=source,
                colour=colour,
                dash=dash,
                marker=MARKERS[(number + 3 * (number // len(HUES))) % len(MARKERS)],
                reference=base in REFERENCES,
                personal=personal,
                runs=tuple(run for run in runs if run.name == name),
            )
        )
    return found


def _base(name: str) -> str:
    """The name without the folder that tells two of its kind apart."""
    return name.partition(" (")[0]


def number(value: Any) -> float | None:
    """A finite number, or None.

    >>> number(2), number("2"), number(float("nan")), number(None)
    (2.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def by_round(run: Run, key: str) -> dict[int, float]:
    """Round -> its number under this key, where it has one."""
    found = {int(record["round"]): number(record.get(key)) for record in run.rounds}
    return {at: value for at, value in found.items() if value is not None}


def summed(run: Run, *keys: str) -> dict[int, float]:
    """Round -> the sum of these keys over all rounds so far; {} where no round has any.

    Round 0 counts nothing: the base model costs no training.
    """
    if not any(number(record.get(key)) is not None for record in run.rounds for key in keys):
        return {}
    total, found = 0.0, {}
    for record in run.rounds:
        if record["round"] > 0:
            total += sum(number(record.get(key)) or 0.0 for key in keys)
        found[int(record["round"])] = total
    return found


def curve(points: Sequence[Mapping[int, tuple[float, float]]]) -> Curve | None:
    """Runs as round -> (x, y), joined over the rounds that all of them have."""
    rounds = sorted(set.intersection(*(set(each) for each in points))) if points else []
    if not rounds:
        return None
    values = [[each[at][1] for each in points] for at in rounds]
    return Curve(
        x=[statistics.fmean(each[at][0] for each in points) for at in rounds],
        mean=[statistics.fmean(each) for each in values],
        low=[min(each) for each in values],
        high=[max(each) for each in values],
    )


def last_with(run: Run, key: str) -> RoundRecord | None:
    """The newest record after any training that has something under this key."""
    trained = [record for record in run.rounds if record["round"] > 0]
    return next((record for record in reversed(trained) if record.get(key)), None)


def last_clients(run: Run, key: str) -> dict[str, float]:
    """Client -> this metric on its own held-out part, when last measured."""
    return _of_clients(last_with(run, "client_held_out"), key)


def first_clients(run: Run, key: str) -> dict[str, float]:
    """Client -> this metric of the base model on its own held-out part."""
    return _of_clients(next((r for r in run.rounds if r["round"] == 0), None), key)


def _of_clients(record: RoundRecord | None, key: str) -> dict[str, float]:
    found = {}
    for client in (record or {}).get("client_held_out") or []:
        value = number(client.get(key))
        if value is not None:
            found[str(client.get("client", "?"))] = value
    return found


def ranks(runs: Sequence[Run]) -> dict[str, int]:
    """Client -> the largest rank it trained in these runs."""
    found: dict[str, int] = {}
    for client in _clients(runs):
        rank = number(client.get("rank"))
        if rank is not None:
            name = str(client.get("client", "?"))
            found[name] = max(found.get(name, 0), int(rank))
    return found


def change_norms(run: Run) -> dict[str, dict[int, float]]:
    """Client -> round -> the size of its change, where the server knows it."""
    found: dict[str, dict[int, float]] = {}
    for record in run.rounds:
        for client in record.get("clients") or []:
            size = number(client.get("change_norm"))
            if size is not None:
                found.setdefault(str(client.get("client", "?")), {})[int(record["round"])] = size
    return found


def without_global_model(series: Series, key: str) -> bool:
    """Whether a metric of the global model is known of the base alone: trained, there is none.

    So it is of methods with personal models, and where each client keeps its own head.
    """
    if series.personal:
        return True
    trained = [record for run in series.drawn for record in run.rounds if record["round"] > 0]
    judged = any(number(record.get("client_held_out_loss")) is not None for record in trained)
    return judged and all(number(record.get(key)) is None for record in trained)


NOT_DRAWN = {
    "aggregation_noise": "aggregation noise",
    "effective_rank": "the effective rank of the change",
    "mean_change_norm": "the size of the clients' changes",
}


def nowhere_drawn(lineup: Sequence[Series]) -> str:
    """What to say of figures that are not there, because nothing in them is known of any run."""
    methods = [series for series in lineup if not series.reference]
    found = []
    if methods and all(without_global_model(series, "held_out_loss") for series in methods):
        names = listing([series.title for series in methods], limit=8)
        found.append(
            f"Without a global model there is no held-out loss of one over rounds: {names}."
        )
    for key, words in NOT_DRAWN.items():
        if not any(by_round(run, key) for series in methods for run in series.drawn):
            said = not_known(methods, key)
            if said:
                found.append(f"{words[0].upper()}{words[1:]}: {said[0].lower()}{said[1:]}")
    return sentences(*found)


def not_known(lineup: Sequence[Series], key: str) -> str:
    """A sentence that names the strategies with rounds in which the server cannot know this key.

    There the record holds null; a record without the key says nothing about it.
    """
    named = [
        series.title
        for series in lineup
        if any(_is_null(r, key) for run in series.drawn for r in run.rounds)
    ]
    return f"Not known to the server, and so not drawn: {listing(named, limit=8)}." if named else ""


def _is_null(record: RoundRecord, key: str) -> bool:
    value = record.get(key, 0)
    return value is None or (isinstance(value, Mapping) and None in value.values())


def noise_as_before(lineup: Sequence[Series]) -> str:
    """A sentence that names the strategies whose noise an earlier Bouquet wrote; mostly empty."""
    named = [series.title for series in lineup if any(r.noise_as_before for r in series.drawn)]
    if not named:
        return ""
    return (
        f"The noise of {listing(named, limit=8)} was written by an earlier version of Bouquet: it "
        "is relative to all that the clients held after training, what they began from included, "
        "and no round's change. It does not compare with the noise of newer runs."
    )


def _clients(runs: Sequence[Run]) -> Iterator[Mapping[str, Any]]:
    for run in runs:
        for record in run.rounds:
            yield from record.get("clients") or []


def mean_over_runs(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Key -> the mean over those that have it, in the order of first appearance.

    >>> mean_over_runs([{"a": 1.0, "b": 5.0}, {"a": 3.0}])
    {'a': 2.0, 'b': 5.0}
    """
    keys = dict.fromkeys(key for each in found for key in each)
    return {key: statistics.fmean(each[key] for each in found if key in each) for key in keys}


def sentences(*found: str) -> str:
    """Those that say something, one after the other.

    >>> sentences("It rains.", "", "It pours.")
    'It rains. It pours.'
    """
    return " ".join(each for each in found if each)


def over_seeds(lineup: Sequence[Series]) -> str:
    """What to say where means over seeds are drawn; nothing where there is one seed only."""
    return "Means over seeds." if any(len(series.drawn) > 1 for series in lineup) else ""
