"""The singular values of the global adapters."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from adapters.adapter import Delta
from adapters.refactoring import singular_values
from core.errors import BouquetError
from journal.results import Run
from journal.state import load_state
from reports import figure_style as style
from reports.figure_data import Series, over_seeds
from reports.figure_style import Plot

MOST_WORK = 1e10
"""Sum over modules of rank cubed, a quarter of a minute; beyond, some modules are left out."""
INVISIBLE = 1e-7
"""Share of the largest singular value below which float32 holds nothing but rounding."""


def spectrum_plot(lineup: Sequence[Series]) -> Plot | None:
    """Singular values of the global adapter, the median module between its tenths."""
    figure = style.new_figure()
    axes = figure.subplots()
    rows: list[list[object]] = []
    lowest, highest, longest = np.inf, 0.0, 0
    for series in lineup:
        found = _first_spectrum(series)
        if found is None:
            continue
        run, (low, median, high) = found
        places = np.arange(1, len(median) + 1)
        axes.fill_between(
            places,
            np.maximum(low, median.min()),
            high,
            color=series.colour,
            alpha=0.1,
            linewidth=0,
            gid=series.gid("band"),
        )
        axes.plot(
            places,
            median,
            color=series.colour,
            linestyle=(0, series.dash) if series.dash else "-",
            marker=series.marker,
            markevery=(series.number % 5 * max(len(places) // 30, 1), max(len(places) // 6, 1)),
            gid=series.gid("line"),
        )
        columns = (low.tolist(), median.tolist(), high.tolist())
        rows += [
            [series.name, run.seed, place, *values]
            for place, values in enumerate(zip(*columns, strict=True), start=1)
        ]
        lowest, highest = min(lowest, median.min()), max(highest, high.max())
        longest = max(longest, len(places))
    if not rows:
        return None
    style.make_logarithmic(axes, "y", float(lowest), float(highest))
    style.whole_numbers(axes.xaxis)
    axes.set(xlabel="direction, the strongest first", ylabel="singular value")
    axes.set_xlim(0.5 - longest * 0.02, longest * 1.02 + 0.5)
    return Plot(
        name="rank-spectrum",
        title="Rank spectrum of the global adapter",
        caption="Singular values of all that the global adapter adds to the base, after the last "
        "saved round; line: the median over modules (of "
        "a large adapter, over some of them), band: from the tenth to "
        "the ninetieth percentile. A line that ends early is an adapter of low rank."
        + (" Of the first seed." if over_seeds(lineup) else ""),
        figure=figure,
        columns=["strategy", "seed", "direction", "tenth_percentile", "median", "ninetieth"],
        rows=rows,
    )


def _first_spectrum(series: Series) -> tuple[Run, npt.NDArray[np.float64]] | None:
    """The first run with a saved global adapter; its tenth, median and ninetieth percentiles."""
    for run in [] if series.personal else series.drawn:
        try:
            state = load_state(run.folder / "state")
            total = state.model.total() if state is not None else None
        except (BouquetError, OSError):
            continue
        spectra = [*singular_values(_thinned(total)).values()] if total is not None else []
        longest = max(map(len, spectra), default=0)
        padded = np.zeros((len(spectra), longest))
        for row, values in zip(padded, spectra, strict=True):
            row[: len(values)] = values
        if padded.size:
            bands = np.percentile(padded, [10, 50, 90], axis=0)
            kept = int(np.sum(bands[1] > INVISIBLE * bands[1, 0]))
            if kept:
                return run, bands[:, :kept]
    return None


def _thinned(delta: Delta) -> Delta:
    """All modules, or evenly spaced ones where all would take too long."""
    step = math.ceil(sum(form.rank**3 for form in delta.values()) / MOST_WORK)
    return Delta(dict(list(delta.items())[:: max(step, 1)]))
