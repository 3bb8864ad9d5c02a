"""The table of a report: what each strategy came to, the best first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from core.units import human_bytes
from journal.record import ACCURACY, LOSS, MACRO_F1, METRICS, NEITHER, OWN_ACCURACY, OWN_LOSS
from journal.results import Spread, SummaryRow
from reports.figure_data import Series, number
from reports.page_verdict import EVALUATED, base_metrics, federated, headline_of, told_apart


@dataclass(frozen=True)
class Column:
    """One metric of the table."""

    key: str
    heading: str
    write: Callable[[float], str]
    about: str = ""

    @property
    def better(self) -> float:
        """1: lower is better; -1: higher; 0: neither is marked."""
        return METRICS[self.key].better if self.key in METRICS else NEITHER


@dataclass(frozen=True)
class Cell:
    """A number, its spread over seeds, and whether it is the best of its column."""

    text: str = ""
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    series: Series
    cells: Sequence[Cell]
    mark: str
    seeds: int
    failures: Sequence[str]


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _share(value: float) -> str:
    return f"{value:.3f}"


def _digits(value: float) -> str:
    return f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:g}"


def _noise(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}".replace("-", "\N{MINUS SIGN}")


def seconds(value: float) -> str:
    """Seconds for people.

    >>> seconds(3.14159), seconds(1234.5)
    ('3.14', '1,234')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


OWN = "what clients hold out of their own data"
DEVIATION = "Standard deviation over clients, each counting once"
RATE = "learning_rate"
COLUMNS = (
    Column(RATE, "rate", _rate, "The learning rate that --tune-rates chose"),
    Column(ACCURACY, "accuracy", _share, "Of the global model on held-out examples"),
    Column(MACRO_F1, "macro-F1", _share, "Mean over classes"),
    Column(LOSS, "held-out loss", _loss, "Of the global model, nats per target"),
    Column("change", "from base", _signed, "The loss less that of the base model"),
    Column(
        "mean_change_norm",
        "size of change",
        _digits,
        "Norm of what a client's training changes in a round, mean over clients and rounds",
    ),
    Column(OWN_ACCURACY, "clients' mean", _share, f"Accuracy on {OWN}, each counting once"),
    Column("worst_client_accuracy", "worst client", _share, f"Least accuracy on {OWN}"),
    Column("client_accuracy_deviation", "between clients", _share, DEVIATION),
    Column(OWN_LOSS, "clients' mean", _loss, f"Loss on {OWN}, weighted by tokens"),
    Column("worst_client_loss", "worst client", _loss, f"Largest loss on {OWN}"),
    Column("client_loss_deviation", "between clients", _share, DEVIATION),
    Column("bytes_up", "up", human_bytes, "All clients, all rounds"),
    Column("bytes_down", "down", human_bytes, "All clients, all rounds"),
    Column("seconds", "seconds", seconds, "All rounds"),
    Column(
        "aggregation_noise",
        "noise",
        _noise,
        "Aggregation noise of the last round, relative to its change",
    ),
)
MOST_BEST = 3
"""Where more share the best value of a column, it says nothing and is not marked."""
LOSSES_OF_CLIENTS = {OWN_LOSS, "worst_client_loss", "client_loss_deviation"}
"""Left out where there are accuracies."""
NOT_OF_REFERENCES = ("bytes_up", "bytes_down", "aggregation_noise", "mean_change_norm")


def table(
    rows: Sequence[SummaryRow], lineup: Sequence[Series]
) -> tuple[list[Column], list[Line], list[Cell]]:
    """Columns that any row fills, the rows, and the cells of the base model."""
    by_name = {series.name: series for series in lineup}
    base = base_metrics([run for series in lineup for run in series.runs])
    metrics = {row.name: _shown(row, by_name[row.name], base) for row in rows}
    filled = {key for each in metrics.values() for key in each}
    if OWN_ACCURACY in filled:
        filled -= LOSSES_OF_CLIENTS
    columns = [column for column in COLUMNS if column.key in filled]
    rivals = [row.name for row in rows if not by_name[row.name].reference]
    best = {c.key: _best([metrics[name] for name in rivals], c) for c in columns}
    headline = headline_of(rows)
    ranked = federated(rows, lineup, headline)
    leaders = [row.name for row in ranked if not told_apart(ranked[0], row, headline)]
    lines = []
    for row in rows:
        series, own = by_name[row.name], metrics[row.name]
        mark = ""
        if len(ranked) > 1 and row.name in leaders:
            mark = "best" if row is ranked[0] else "not told apart"
        cells = [
            _cell(c, own[c.key], None if series.reference else best[c.key])
            if c.key in own
            else Cell()
            for c in columns
        ]
        reasons = [f"seed {seed}: {reason}" for seed, reason in row.failures.items()]
        if len(set(row.failures.values())) == 1 and not row.seeds:
            reasons = [next(iter(row.failures.values()))]
        lines.append(Line(series, cells, mark, len(row.seeds), reasons))
    return columns, lines, [_cell(c, base[c.key]) if c.key in base else Cell() for c in columns]


def _shown(row: SummaryRow, series: Series, base: Mapping[str, Spread]) -> dict[str, Spread]:
    found = dict(row.metrics)
    if LOSS in found and LOSS in base:
        found["change"] = Spread((found[LOSS].mean - base[LOSS].mean,))
    chosen = [run.tuning.get("chosen") for run in series.runs if run.tuning is not None]
    rates = {rate for rate in map(number, chosen) if rate is not None}
    if rates:  # all seeds of a method take the same
        found[RATE] = Spread(tuple(rates))
    for key in NOT_OF_REFERENCES if series.reference else ():
        found.pop(key, None)
    if series.personal:
        found.pop("aggregation_noise", None)
    return found


def _best(metrics: Sequence[Mapping[str, Spread]], column: Column) -> str | None:
    """The best value of a column as it is written."""
    values = [each[column.key].mean for each in metrics if column.key in each]
    if column.better == 0.0 or len(values) < 2:
        return None
    best = column.write(min(values) if column.better > 0 else max(values))
    return best if [column.write(value) for value in values].count(best) <= MOST_BEST else None


def _cell(column: Column, spread: Spread, best: str | None = None) -> Cell:
    over_seeds = column.key in EVALUATED and len(spread.values) > 1
    deviation = column.write(spread.deviation) if over_seeds else ""
    written = column.write(spread.mean)
    return Cell(written, deviation, written == best)
