"""How far training moves: the size of each client's change in each round, and their mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from journal.record import value_of
from journal.results import Run
from reports import figure_style as style
from reports.figure_data import (
    Series,
    by_round,
    change_norms,
    mean_over_runs,
    not_known,
    over_seeds,
    sentences,
)
from reports.figure_style import Plot

MEAN = "mean_change_norm"
MOST_LINES = 40
"""Of more clients than these, only the range is drawn."""


def change_plot(lineup: Sequence[Series]) -> Plot | None:
    """||D_k|| of each client over rounds, thin, and the mean over the round's clients, thick."""
    found = []
    rows: list[list[Any]] = []
    for series in lineup:
        sizes = [change_norms(run) for run in series.drawn]
        means = [by_round(run, MEAN) for run in series.drawn]
        if not any(means):
            continue
        for run, each in zip(series.drawn, sizes, strict=True):
            rows += _rows(series.name, run, each)
        clients = sorted({client for each in sizes for client in each})
        of_clients = [_joined([each.get(client, {}) for each in sizes]) for client in clients]
        found.append((series, of_clients, _joined([_with_gaps(run) for run in series.drawn])))
    if not found:
        return None
    figure, panels = style.panels(len(found), 5, 1.75, share_y=True)
    for axes, (series, of_clients, mean) in zip(panels, found, strict=True):
        _panel(axes, series, of_clients, mean)
    most = max(v for _, clients, mean in found for v in _known(*clients, mean))
    panels[0].set_ylim(0.0, 1.12 * most if most > 0.0 else 1.0)  # whole markers at the top
    figure.supxlabel("round", fontsize=9, color=style.MUTED)
    figure.supylabel("size of a client's change", fontsize=9, color=style.MUTED)
    return Plot(
        name="change",
        title="Size of the clients' changes",
        caption=sentences(
            "Frobenius norm, over all modules, of what a client's training changed in the round: "
            "thin, each client; thick, the mean over the round's clients. At one learning rate "
            "methods take steps of different size, so a lower loss may be the longer way only: "
            "compare methods of similar change, or give each its own rate.",
            f"Of more than {MOST_LINES} clients the shade is the range."
            if any(len(of_clients) > MOST_LINES for _, of_clients, _ in found)
            else "",
            over_seeds(lineup),
            not_known(lineup, MEAN),
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "client", "change_norm"],
        rows=rows,
        wide=len(found) > 2,
    )


def _rows(name: str, run: Run, sizes: Mapping[str, Mapping[int, float]]) -> list[list[Any]]:
    """Each client's size in each round, and beside them the recorded mean."""
    means = by_round(run, MEAN)
    return [
        [name, run.seed, at, client, value]
        for at, mean in means.items()
        for client, value in [
            *((client, each[at]) for client, each in sizes.items() if at in each),
            ("mean", mean),
        ]
    ]


def _known(*lines: Mapping[int, float]) -> list[float]:
    """All that is drawn of these lines."""
    return [value for line in lines for value in line.values() if not math.isnan(value)]


def _with_gaps(run: Run) -> dict[int, float]:
    """Round -> the mean; not-a-number, a gap in the line, where the server cannot know it."""
    unknown = [int(r["round"]) for r in run.rounds if MEAN in r and value_of(r, MEAN) is None]
    return by_round(run, MEAN) | dict.fromkeys(unknown, math.nan)


def _joined(over_seeds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Round -> the mean over seeds, in the order of rounds."""
    means = mean_over_runs([{str(at): value for at, value in each.items()} for each in over_seeds])
    return {int(at): means[at] for at in sorted(means, key=int)}


def _panel(
    axes: Axes,
    series: Series,
    of_clients: Sequence[Mapping[int, float]],
    mean: Mapping[int, float],
) -> None:
    if len(of_clients) > MOST_LINES:
        rounds = sorted({at for each in of_clients for at in each})
        values = [[each[at] for each in of_clients if at in each] for at in rounds]
        axes.fill_between(
            rounds,
            [min(each) for each in values],
            [max(each) for each in values],
            color=series.colour,
            alpha=0.2,
            linewidth=0,
            gid=series.gid("range"),
        )
    else:
        for k, each in enumerate(of_clients):
            axes.plot(
                [*each],
                [*each.values()],
                color=series.colour,
                linewidth=0.8,
                alpha=0.45,
                marker=".",
                markersize=2.5,
                gid=series.gid(f"client-{k}"),
            )
    axes.plot(
        [*mean],
        [*mean.values()],
        color=series.colour,
        linewidth=2.2,
        marker=series.marker,
        markersize=3.5,
        markevery=max(len(mean) // 8, 1),
        gid=series.gid("mean"),
    )
    style.whole_numbers(axes.xaxis)
    axes.set_title(style.short(series.name, 18), fontsize=8.5, gid=series.gid("title"))
