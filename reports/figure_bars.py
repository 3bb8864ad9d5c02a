"""Figures in small panels and bars: each client, bytes of each round, seconds by phase."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from core.units import human_bytes
from journal.record import RoundRecord
from reports import figure_style as style
from reports.figure_data import (
    Series,
    by_round,
    first_clients,
    last_clients,
    last_with,
    mean_over_runs,
    number,
    over_seeds,
    ranks,
    sentences,
)
from reports.figure_style import Plot

PHASES = ("train", "evaluate", "aggregate", "telemetry", "other")
CLIENT_METRICS = {
    "accuracy": ("own held-out accuracy", "further to the right is better"),
    "loss": ("own held-out loss, nats per target", "further to the left is better"),
}


def clients_plot(lineup: Sequence[Series]) -> Plot | None:
    """Each client's metric on its own held-out part: from the base to the end, by strategy."""
    runs = [run for series in lineup for run in series.drawn]
    metric = next((m for m in CLIENT_METRICS if any(last_clients(r, m) for r in runs)), None)
    if metric is None:
        return None
    found = []
    rows: list[list[Any]] = []
    for series in lineup:
        ends = [last_clients(run, metric) for run in series.drawn]
        if not any(ends):
            continue
        begins = [first_clients(run, metric) for run in series.drawn]
        own = ranks(series.drawn)
        for run, end, begin in zip(series.drawn, ends, begins, strict=True):
            at = (last_with(run, "client_held_out") or {}).get("round")
            for client, value in end.items():
                rows.append(
                    [series.name, run.seed, at, client, own.get(client), begin.get(client), value]
                )
        found.append((series, mean_over_runs(ends), mean_over_runs(begins), own))
    clients = sorted({client for _, ends, _, _ in found for client in ends})
    deepest = min(max(0.17 * len(clients), 1.1), 8.0)
    figure, panels = style.panels(
        len(found), 4 if len(found) <= 12 else 5, deepest + 0.35, share_x=True, share_y=True
    )
    all_ranks = {k: r for _, _, _, own in found for k, r in own.items()}
    for axes, (series, final, base, _) in zip(panels, found, strict=True):
        _client_panel(axes, series, clients, final, base)
    step = math.ceil(len(clients) * 0.15 / deepest)
    names = [
        style.short(c, 16) + (f", rank {all_ranks[c]}" if c in all_ranks else "") for c in clients
    ]
    for axes in panels:
        axes.set_yticks(range(0, len(clients), step), names[::step], fontsize=7.5)
        axes.set_ylim(len(clients) - 0.4, -0.6)
    words, better = CLIENT_METRICS[metric]
    figure.supxlabel(words, fontsize=9, color=style.MUTED)
    return Plot(
        name=f"clients-{metric}",
        title="Each client on its own held-out examples",
        caption=sentences(
            "From the base model (end of the thin line) to the last round (the marker): "
            f"{words}; {better}. Rows are clients with the largest rank they trained.",
            over_seeds(lineup),
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "client", "rank", f"base_{metric}", metric],
        rows=rows,
        wide=len(found) > 2,
    )


def _client_panel(
    axes: Axes,
    series: Series,
    clients: Sequence[str],
    ends: Mapping[str, float],
    begins: Mapping[str, float],
) -> None:
    both = [place for place, client in enumerate(clients) if client in ends and client in begins]
    axes.hlines(
        both,
        [begins[clients[place]] for place in both],
        [ends[clients[place]] for place in both],
        color=series.colour,
        linewidth=1.1,
        alpha=0.65,
        gid=series.gid("change"),
    )
    places = [place for place, client in enumerate(clients) if client in ends]
    values = [ends[clients[place]] for place in places]
    axes.plot(
        values,
        places,
        linestyle="none",
        marker="o" if series.reference else series.marker,
        color=series.colour,
        gid=series.gid("end"),
    )
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(style.short(series.name, 24), gid=series.gid("title"))


def bytes_plot(lineup: Sequence[Series]) -> Plot | None:
    """Up above, down below, for each strategy and round."""
    found = []
    rows: list[list[Any]] = []
    for series in lineup:
        ups = [by_round(run, "bytes_up") for run in series.drawn]
        downs = [by_round(run, "bytes_down") for run in series.drawn]
        if series.reference or (not any(ups) and not any(downs)):
            continue
        for run, up, down in zip(series.drawn, ups, downs, strict=True):
            rows += [
                [series.name, run.seed, at, _whole(up.get(at)), _whole(down.get(at))]
                for at in sorted({*up, *down})
            ]
        found.append((series, _mean_by_round(ups), _mean_by_round(downs)))
    if not found:
        return None
    totals = [sum(up.values()) + sum(down.values()) for _, up, down in found]
    own_scales = max(totals) > 8.0 * min(totals)
    figure, panels = style.panels(len(found), 5, 1.75, share_y=not own_scales)
    for axes, (series, up, down), total in zip(panels, found, totals, strict=True):
        axes.bar([*up], [*up.values()], color=series.colour, gid=series.gid("up"))
        axes.bar(
            [*down],
            [-v for v in down.values()],
            color=series.colour,
            alpha=0.45,
            gid=series.gid("down"),
        )
        axes.axhline(0.0, color=style.RULE, linewidth=0.8)
        style.bytes_axis(axes.yaxis)
        style.whole_numbers(axes.xaxis)
        axes.set_title(
            f"{style.short(series.name, 18)}: {human_bytes(total)}",
            fontsize=8.5,
            gid=series.gid("title"),
        )
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
    figure.supxlabel("round", fontsize=9, color=style.MUTED)
    figure.supylabel("received (below), sent (above)", fontsize=9, color=style.MUTED)
    return Plot(
        name="bytes",
        title="Bytes of each round",
        caption=sentences(
            "What all clients together send up (above the line) and receive (below it, paler) "
            "in each round, adapters only; beside each name, the sum over rounds.",
            over_seeds(lineup),
            "Each panel has its own scale." if own_scales else "",
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "bytes_up", "bytes_down"],
        rows=rows,
        wide=len(found) > 2,
    )


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and value.is_integer() else value


def _mean_by_round(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    texts = mean_over_runs([{str(at): value for at, value in each.items()} for each in found])
    return {int(at): texts[at] for at in sorted(texts, key=int)}


def seconds_plot(lineup: Sequence[Series]) -> Plot | None:
    """Where the time of all rounds goes."""
    found = []
    rows: list[list[Any]] = []
    for series in lineup:
        phases = [_seconds(run.rounds) for run in series.drawn]
        for run, each in zip(series.drawn, phases, strict=True):
            if each:
                rows.append([series.name, run.seed, *(each.get(phase) for phase in PHASES)])
        if any(phases):
            found.append((series, mean_over_runs(phases)))
    if not found:
        return None
    wide = len(found) > 2
    figure = style.new_figure(style.WIDE if wide else style.HALF, 1.2 + 0.24 * len(found))
    axes = figure.subplots()
    begins = np.zeros(len(found))
    for phase, (colour, _) in zip(PHASES, style.PHASES, strict=True):
        widths = np.array([means.get(phase, 0.0) for _, means in found])
        if not widths.any():
            continue
        bars = axes.barh(range(len(found)), widths, 0.68, begins, color=colour, label=phase)
        for bar, (series, _) in zip(bars, found, strict=True):
            bar.set_gid(series.gid(f"{phase}-seconds"))
        begins += widths
    for place, ((series, _), end) in enumerate(zip(found, begins, strict=True)):
        axes.text(
            end,
            place,
            f"  {end:,.4g}",
            va="center",
            fontsize=8,
            color=style.MUTED,
            gid=series.gid("sum"),
        )
    axes.set_yticks(range(len(found)), [style.short(s.name) for s, _ in found])
    for label, (series, _) in zip(axes.get_yticklabels(), found, strict=True):
        label.set_gid(series.gid("label"))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(0, float(max(begins)) * 1.08 or 1.0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of all rounds together")
    figure.legend(
        loc="outside upper left",
        ncols=len(PHASES),
        handlelength=1.0,
        columnspacing=1.2,
        handleheight=0.9,
    )
    return Plot(
        name="seconds",
        title="Seconds by phase",
        caption=sentences(
            "Where the time of all rounds goes: training at the clients, evaluation, the "
            "server's aggregation, its measurements for this report (telemetry), and the rest, "
            "as this machine took them, with whatever else it was doing.",
            over_seeds(lineup),
        ),
        figure=figure,
        columns=["strategy", "seed", *(f"{phase}_seconds" for phase in PHASES)],
        rows=rows,
        wide=wide,
    )


def _seconds(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    """Phase -> its seconds over all rounds; what no phase accounts for is `other`."""
    trained = [record for record in rounds if record["round"] > 0]
    found: dict[str, float] = {}
    for phase in PHASES[:-1]:
        values = [number(record.get(f"{phase}_seconds")) for record in trained]
        known = [value for value in values if value is not None]
        if known:
            found[phase] = math.fsum(known)
    whole = [value for r in trained if (value := number(r.get("seconds"))) is not None]
    if whole:
        found["other"] = max(math.fsum(whole) - math.fsum(found.values()), 0.0)
    return found
