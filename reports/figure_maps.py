"""Maps: noise over modules and strategies, and how alike the clients' updates are."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from journal.record import RoundRecord, value_of
from reports import figure_style as style
from reports.figure_data import (
    Series,
    last_with,
    mean_over_runs,
    not_known,
    number,
    over_seeds,
    ranks,
    sentences,
)
from reports.figure_style import Plot

ABOUT_MODULES = {
    "module_noise": (
        "noise-of-modules",
        "Aggregation noise of each module",
        "How far the last round's change of each module is from the ideal one, relative to it.",
    ),
    "module_distribution_noise": (
        "missed-by-clients",
        "What clients of low rank miss of each module",
        "The part of what the next round starts from that lies beyond a client's rank, relative "
        "to the round's ideal change, averaged over clients by weight.",
    ),
}
SLANTED: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}


def module_map(lineup: Sequence[Series], key: str) -> Plot | None:
    """Modules by strategies, after the last round, in logarithmic colour."""
    columns: dict[Series, Mapping[str, float]] = {}
    rows: list[list[Any]] = []
    for series in lineup:
        found = []
        for run in series.drawn:
            record = last_with(run, key) or {}
            if series.personal or number(record.get("ideal_change_norm")) == 0.0:
                continue
            values = {
                str(name): value
                for name, raw in (value_of(record, key) or {}).items()
                if (value := number(raw)) is not None
            }
            rows += [
                [series.name, run.seed, record["round"], name, value]
                for name, value in values.items()
            ]
            found.append(values)
        if any(found):
            columns[series] = mean_over_runs(found)
    modules = sorted({name for each in columns.values() for name in each}, key=natural)
    table = np.array([[each.get(m, np.nan) for each in columns.values()] for m in modules])
    if not columns or not np.any(table > 0.0):
        return None
    name, title, caption = ABOUT_MODULES[key]
    wide = len(columns) > style.MANY
    height = min(max(1.6 + 0.17 * len(modules), 3.0), 9.0)
    figure = style.new_figure(style.WIDE if wide else style.HALF, height)
    axes = figure.subplots()
    positive = table[table > 0.0]
    norm = LogNorm(*style.decades(float(np.min(positive)), float(np.max(positive))))
    image = axes.imshow(
        np.ma.masked_where(~(table > 0.0), table),
        norm=norm,
        cmap=style.INTENSITY,
        aspect="auto",
        interpolation="none",
    )
    zeros = np.argwhere(table == 0.0)
    _bare(axes)
    shown = _shortened(modules)
    step = math.ceil(len(modules) * 0.15 / (height - 1.2))
    for y, x in zeros if step == 1 else []:
        axes.text(x, y, "0", ha="center", va="center", fontsize=7, color=style.MUTED)
    axes.set_yticks(range(0, len(modules), step), shown[::step], fontsize=7.5)
    axes.set_xticks(
        range(len(columns)),
        [style.short(series.name, 18) for series in columns],
        **({} if len(columns) <= 3 else SLANTED),
    )
    for label, series in zip(axes.get_xticklabels(), columns, strict=True):
        label.set_gid(series.gid("label"))
    _scale(figure, image, axes, norm)
    across = ", columns strategies" if len(columns) > 1 else ""
    return Plot(
        name=name,
        title=title,
        caption=sentences(
            caption,
            f"Rows are modules{across}; the colour is logarithmic, stronger is more.",
            "Clear is exactly zero." if len(zeros) else "",
            over_seeds(lineup),
            not_known(lineup, key),
        ),
        figure=figure,
        columns=["strategy", "seed", "round", "module", key],
        rows=rows,
        wide=wide,
    )


def similarity_plot(lineup: Sequence[Series]) -> Plot | None:
    """For each strategy, the cosine between any two clients' updates in the last round."""
    found = []
    rows: list[list[Any]] = []
    samples: list[int] = []
    for series in lineup:
        record = next((r for run in series.drawn if (r := last_with(run, "cosine"))), None)
        matrix = _square(record)
        if record is None or matrix is None:
            continue
        seed = next(run.seed for run in series.drawn if last_with(run, "cosine") is record)
        names = [str(client.get("client", "?")) for client in record.get("clients") or []]
        if sampled := record.get("cosine_sampled"):
            names = list(map(str, sampled))
            samples.append(len(names))
        if len(names) != len(matrix):
            names = [str(k) for k in range(len(matrix))]
        for j, one in enumerate(names):
            rows += [
                [series.name, seed, record["round"], one, other, float(matrix[j, k])]
                for k, other in enumerate(names)
            ]
        found.append((series, names, matrix))
    if not found:
        return None
    extent = max(float(np.max(np.abs(m - np.diag(np.diag(m))))) for _, _, m in found)
    norm = Normalize(-extent, extent)
    across = min(5, len(found))
    down = math.ceil(len(found) / across)
    wide = across > 2
    width = style.WIDE if wide else style.HALF
    figure = style.new_figure(width, min(0.2 + down * (0.87 * width / max(across, 2) - 0.05), 14.0))
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (series, names, matrix) in zip(grid.flat, found, strict=False):
        masked = np.ma.masked_where(np.eye(len(matrix), dtype=bool), matrix)
        axes.imshow(masked, norm=norm, cmap=style.SIGNED, interpolation="none")
        axes.set_title(style.short(series.name, 24), gid=series.gid("title"))
        _bare(axes)
        step = math.ceil(len(names) / 12)
        own = ranks(series.drawn)
        labels = [f"{_client(n)} (r {own[n]})" if n in own else _client(n) for n in names]
        axes.set_yticks(range(0, len(names), step), labels[::step], fontsize=6.5)
        axes.set_xticks([])
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, style.SIGNED),
        ax=grid,
        shrink=0.6 if down > 1 else 0.85,
        aspect=25,
        pad=0.01,
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    return Plot(
        name="client-similarity",
        title="How alike the clients' updates are",
        caption="Cosine between what any two clients changed in the last round"
        f"{' of the first seed' if over_seeds(lineup) else ''}: "
        "blue where they pull the same way, orange where they pull against each other, clear where "
        "they have nothing to do with each other. Rows and columns are clients, with their rank; "
        "the diagonal, always 1, is left out."
        + (f" Of many clients {max(samples)} were chosen by chance." if samples else ""),
        figure=figure,
        columns=["strategy", "seed", "round", "client", "other", "cosine"],
        rows=rows,
        wide=wide,
    )


def _square(record: RoundRecord | None) -> npt.NDArray[np.float64] | None:
    """The matrix of cosines; None where there is none, or nothing beside its diagonal."""
    try:
        matrix = np.array((record or {}).get("cosine") or [], np.float64)
    except (TypeError, ValueError):
        return None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        return None
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    return matrix if np.all(np.isfinite(matrix)) and np.any(others != 0.0) else None


def _bare(axes: Axes) -> None:
    """No frame, no grid, no tick marks."""
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _scale(figure: Figure, image: Any, axes: Axes, norm: Normalize) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=28, pad=0.015)
    bar.outline.set_visible(False)
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    ticks = [t for t in style.logarithmic_ticks(low, high, 6) if low <= t <= high] or [low, high]
    bar.set_ticks(ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_two_digits))
    bar.ax.tick_params(labelsize=7.5)


def _two_digits(value: float, _: int | None) -> str:
    return style.power_of_ten(float(f"{value:.2g}"))


def _client(name: str) -> str:
    return style.short(name.removeprefix("client-"), 14)


def _shortened(modules: Sequence[str]) -> list[str]:
    """Names of modules without the parts that all of them begin with.

    >>> _shortened(["model.layers.0.q_proj", "model.layers.1.q_proj"])
    ['0.q_proj', '1.q_proj']
    """
    parts = [module.split(".") for module in modules]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [style.short(".".join(p[common:]), 34) for p in parts]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 after layer 9.

    >>> sorted(["b.10", "b.9"], key=natural)
    ['b.9', 'b.10']
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
