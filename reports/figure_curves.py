"""Figures over rounds: quality, aggregation noise, effective rank."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from core.errors import listing
from journal.record import ACCURACY, LOSS, MACRO_F1, METRICS, OWN_LOSS, RoundRecord, value_of
from journal.results import Run
from reports import figure_style as style
from reports.figure_data import (
    Curve,
    Series,
    by_round,
    curve,
    noise_as_before,
    not_known,
    number,
    sentences,
    summed,
    without_global_model,
)
from reports.figure_style import Plot

ROUNDS, BYTES, SECONDS = "rounds", "bytes", "seconds"
DRAWN = {
    LOSS: ("Held-out loss", "loss"),
    ACCURACY: ("Held-out accuracy", "accuracy"),
    MACRO_F1: ("Held-out macro-F1", "macro-f1"),
    OWN_LOSS: ("The clients' own held-out loss", "client-loss"),
    "loss_before_aggregation": ("Loss before aggregation", "loss-before"),
}
"""Metric -> the title of its figure, and the name of its files."""
GLOBAL = (LOSS, ACCURACY, MACRO_F1)
"""Metrics of the global model."""
EXPECTED = {
    LOSS: "Loss of the global model on the examples that no client trains on",
    ACCURACY: "Accuracy of the global model on the examples that no client trains on",
    MACRO_F1: "F1 of each class, averaged over classes, on the examples that no client trains on",
    OWN_LOSS: "Loss on what each client holds out of its own data, methods with personal models "
    "included",
    "loss_before_aggregation": "Mean loss, by p_k, of the clients' models as they came back, on "
    "the examples that no client trains on, where the held-out loss is that after aggregation",
}
ABSCISSAS = {
    ROUNDS: ("round (0 is the base model)", "over rounds", ""),
    BYTES: (
        "bytes sent so far, up and down",
        "over bytes",
        "The axis counts the bytes that all clients together have sent and received.",
    ),
    SECONDS: (
        "seconds so far",
        "over seconds",
        "The axis counts the seconds of all rounds so far, as this machine took them.",
    ),
}


def quality_plot(lineup: Sequence[Series], key: str, x: str) -> Plot | None:
    """A metric of the model over rounds, bytes or seconds."""
    title, name = DRAWN[key]
    unit = METRICS[key].unit
    axis_label, over, explained = ABSCISSAS[x]
    figure = style.new_figure()
    axes = figure.subplots()
    rows: list[list[Any]] = []
    curves = []
    without: list[str] = []
    for series in lineup:
        if key in GLOBAL and without_global_model(series, key):
            without.append(series.title)
            continue
        joined = _against(series, key, x, rows)
        if joined is None:
            continue
        if series.reference:
            _draw_level(axes, series, joined)
        elif x == ROUNDS or joined.x[-1] > 0.0:
            curves.append((series, joined))
    if not curves:
        return None
    axes.set(xlabel=axis_label, ylabel=f"{title.removeprefix('The ').lower()}, {unit}")
    ends = [each.x[-1] for _, each in curves]
    if x == ROUNDS:
        style.whole_numbers(axes.xaxis)
    elif x == BYTES and max(ends) > 20.0 * min(ends):
        curves = [(series, each.beyond_zero()) for series, each in curves]
        least = min(each.x[0] for _, each in curves)
        style.make_logarithmic(axes, "x", least, max(ends), in_bytes=True)
        explained += " The axis is logarithmic, so the base model, at zero bytes, is not on it."
    elif x == BYTES:
        style.bytes_axis(axes.xaxis)
    for series, joined in curves:
        _draw_curve(axes, series, joined)
    return Plot(
        name=f"{name}-{x}",
        title=f"{title} {over}",
        caption=sentences(
            f"{EXPECTED[key]}; {METRICS[key].which_is_better}.",
            explained,
            _bands(lineup),
            _levels(lineup, key),
            f"Without a global model, and so not drawn: {listing(without, limit=8)}."
            if without
            else "",
        ),
        figure=figure,
        columns=["strategy", "seed", "round", *([] if x == ROUNDS else [f"{x}_so_far"]), key],
        rows=rows,
    )


def _against(series: Series, key: str, x: str, rows: list[list[Any]]) -> Curve | None:
    """The metric joined over seeds; what it is joined from goes to rows."""
    points = []
    for run in series.drawn:
        values = by_round(run, key)
        places = _places(run, x)
        if series.reference:
            values = {at: value for at, value in values.items() if at > 0}
            places = {at: places.get(at, 0.0) for at in values}
        both = {at: (places[at], value) for at, value in values.items() if at in places}
        for at, (place, value) in both.items():
            rows.append([series.name, run.seed, at, *([] if x == ROUNDS else [place]), value])
        points.append(both)
    return curve([each for each in points if each])


def _places(run: Run, x: str) -> dict[int, float]:
    """Round -> where it lies on the axis."""
    if x == ROUNDS:
        return {int(record["round"]): float(record["round"]) for record in run.rounds}
    return summed(run, *(("bytes_up", "bytes_down") if x == BYTES else ("seconds",)))


def _draw_curve(axes: Axes, series: Series, joined: Curve) -> None:
    if joined.low != joined.high:
        axes.fill_between(
            joined.x,
            joined.low,
            joined.high,
            color=series.colour,
            alpha=0.14,
            linewidth=0,
            gid=series.gid("band"),
        )
    axes.plot(
        joined.x,
        joined.mean,
        color=series.colour,
        linestyle=(0, series.dash) if series.dash else "-",
        marker=series.marker,
        markevery=max(len(joined.x) // 10, 1),
        gid=series.gid("line"),
    )


def _draw_level(axes: Axes, series: Series, joined: Curve) -> None:
    """A reference: its last value as a line across, named at its right end."""
    level = joined.mean[-1]
    axes.axhline(
        level,
        color=series.colour,
        linewidth=1.3,
        linestyle=(0, series.dash),
        gid=series.gid("line"),
    )
    right = series.number % 2 == 0
    axes.annotate(
        style.short(series.name),
        (float(right), level),
        xycoords=("axes fraction", "data"),
        xytext=(0 if right else 4, 3),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=8,
        color=style.REFERENCE,
        gid=series.gid("name"),
    )


def _bands(lineup: Sequence[Series]) -> str:
    if all(len(series.drawn) < 2 for series in lineup):
        return ""
    return "Lines: means over seeds; bands: from the least to the most."


def _levels(lineup: Sequence[Series], key: str) -> str:
    named = [s.name for s in lineup if s.reference and any(by_round(r, key) for r in s.drawn)]
    return f"Level lines: {' and '.join(named)} after all training." if named else ""


def _over_rounds(
    lineup: Sequence[Series], key: str
) -> tuple[list[tuple[Series, Curve]], list[Any]]:
    """Each strategy's joined values of a key, and what they are joined from."""
    found, rows = [], []
    for series in lineup:
        if series.reference:
            continue
        points = []
        for run in series.drawn:
            values = {
                int(record["round"]): (float(record["round"]), value)
                for record in run.rounds
                if (value := _known(record, key)) is not None
                and number(record.get("ideal_change_norm")) != 0.0
            }
            rows += [
                [series.name, run.seed, at, None if math.isnan(value) else value]
                for at, (_, value) in values.items()
            ]
            points.append(values)
        drawn = [each for each in points if any(not math.isnan(y) for _, y in each.values())]
        joined = curve(drawn)
        if joined is not None:
            found.append((series, joined))
    return found, rows


def _known(record: RoundRecord, key: str) -> float | None:
    """A number; not-a-number, a gap in the line, where the server cannot know it."""
    value = value_of(record, key)
    return math.nan if key in record and value is None else number(value)


def noise_plot(lineup: Sequence[Series]) -> Plot | None:
    """How far each round's global model is from the exact weighted sum."""
    found, rows = _over_rounds([s for s in lineup if not s.personal], "aggregation_noise")
    if not found:
        return None
    drawn = (value for _, c in found for value in (*c.low, *c.mean, *c.high))
    values = [value for value in drawn if not math.isnan(value)]
    positive = [value for value in values if value > 0.0]
    wide = len(found) > style.MANY
    bottom, top = style.decades(min(positive, default=1e-8), max(positive, default=1.0))
    exact = len(positive) < len(values)
    floor = bottom / 10.0 if exact else bottom
    figure = style.new_figure(style.WIDE if wide else style.HALF, 3.9)
    axes = figure.subplots()
    style.make_logarithmic(axes, "y", floor, top)
    caption = (
        "Distance between what the round did to the global model and the ideal change, the "
        "weighted sum of the clients' changes, relative to the latter, on a logarithmic axis: 10⁻⁷ "
        "is the rounding of float32, 1 is as large as the change itself."
    )
    if exact:
        axes.axhline(floor, color=style.RULE, linewidth=0.8, linestyle=":")
        ticks = style.logarithmic_ticks(bottom, top)
        axes.set_yticks([floor, *ticks], ["0", *map(style.power_of_ten, ticks)])
        caption += " Exact zeros lie on the dotted line at the bottom."
    for series, c in found:
        low, mean, high = ([max(v, floor) for v in each] for each in (c.low, c.mean, c.high))
        _draw_curve(axes, series, Curve(c.x, mean, low, high))
    style.whole_numbers(axes.xaxis)
    axes.set(xlabel="round", ylabel="aggregation noise")
    return Plot(
        name="aggregation-noise",
        title="Aggregation noise over rounds",
        caption=sentences(
            caption, _bands(lineup), not_known(lineup, "aggregation_noise"), noise_as_before(lineup)
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "aggregation_noise"],
        rows=rows,
        wide=wide,
    )


def effective_rank_plot(lineup: Sequence[Series]) -> Plot | None:
    """In how many directions each round's ideal change goes."""
    found, rows = _over_rounds(lineup, "effective_rank")
    if not found:
        return None
    figure = style.new_figure()
    axes = figure.subplots()
    for series, joined in found:
        _draw_curve(axes, series, joined)
    style.whole_numbers(axes.xaxis)
    axes.set(xlabel="round", ylabel="effective rank of the ideal change")
    return Plot(
        name="effective-rank",
        title="Effective rank of each round's change",
        caption=sentences(
            "In how many directions the weighted sum of the clients' changes goes: the exponential "
            "of the entropy of its singular values, averaged over modules.",
            _bands(lineup),
            not_known(lineup, "effective_rank"),
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "effective_rank"],
        rows=rows,
    )
