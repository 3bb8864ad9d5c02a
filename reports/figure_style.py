"""How a figure looks: colours that a page can exchange, fonts, axes for logarithms and bytes.

A figure is drawn with the colours of a light page. Each of them stands for one CSS variable, which
takes their place where the figure goes into the page, so that it follows the page into the dark.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from core.units import human_bytes

INK, MUTED, RULE, GRID = "#1c2127", "#5a636d", "#99a1aa", "#e3e7eb"
REFERENCE = "#3f474f"
HUES = (
    ("#08347f", "#617ede"),
    ("#ae2f19", "#e86329"),
    ("#097753", "#3fdea3"),
    ("#ba468f", "#ed75ba"),
    ("#bb8a00", "#e4d53d"),
    ("#2097fa", "#b1cdff"),
    ("#43262d", "#a26e56"),
)
"""Pairs for a light and a dark page, apart from each other under every kind of colour blindness."""
PHASES = (
    ("#31688e", "#5fa3d3"),
    ("#d98c21", "#f0b45c"),
    ("#8d6bb0", "#b79ad6"),
    ("#5e9f74", "#82c99b"),
    ("#aab2ba", "#68717a"),
)
VARIABLES: Mapping[str, str] = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    GRID: "grid",
    REFERENCE: "reference",
    **{light: f"hue-{k}" for k, (light, _) in enumerate(HUES)},
    **{light: f"phase-{k}" for k, (light, _) in enumerate(PHASES)},
}
"""Colour of a drawn figure -> CSS variable of the page."""
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "bouquet",
}
HALF, WIDE = 5.2, 10.6
"""Widths in inches of a figure that shares its row on the page, and of one that fills it."""
MANY = 8
"""Beyond so many strategies, some figures take a row of their own."""
Colour = tuple[float, float, float, float]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def styled() -> AbstractContextManager[None]:
    """The settings of matplotlib under which figures are both made and written."""
    return mpl.rc_context(STYLE)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Plot:
    """One figure with the words and the numbers that belong to it."""

    name: str
    """Of its files and, as a prefix, of its ids in the page."""
    title: str
    caption: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """What is drawn, as it was recorded."""
    wide: bool = False


class NotebookFigure(Figure):
    """A figure that a notebook shows, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=110, facecolor="white")
        return picture.getvalue()


def new_figure(width: float = HALF, height: float = 3.6) -> Figure:
    """An empty figure that lays itself out."""
    return NotebookFigure(figsize=(width, height), layout="constrained")


def panels(
    count: int, across: int, height: float, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """So many small axes, row by row."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = new_figure(WIDE if count > 2 else HALF, down * height + 0.4)
    grid = figure.subplots(down, across, squeeze=False, sharex=share_x, sharey=share_y)
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    if share_x and count % across:
        for axes in grid[-2, count % across :] if down > 1 else []:
            axes.tick_params(labelbottom=True)
    return figure, list(grid.flat)[:count]


def write_png(figure: Figure, path: Path, names: Sequence[str]) -> None:
    """The figure on white, with the legend that the page has at its top.

    names: of the strategies, by their number in gids.
    """
    lines: dict[int, Line2D] = {}
    for line in figure.findobj(Line2D):
        if found := re.fullmatch(r"series-(\d+)-line", str(line.get_gid())):
            lines.setdefault(int(found[1]), line)
    size = figure.get_size_inches()
    with warnings.catch_warnings():  # a name in a script that the font lacks
        warnings.simplefilter("ignore", UserWarning)
        if lines:
            labels = [names[number] for number in sorted(lines)]
            handles = [lines[number] for number in sorted(lines)]
            columns = max(2, int(size[0] / 1.4))
            legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
            figure.set_size_inches(size[0], size[1] + 0.2 * -(-len(lines) // columns))
            figure.savefig(path, dpi=150, facecolor="white")
            legend.remove()
            figure.set_size_inches(*size)
            figure.draw_without_rendering()
        else:
            figure.savefig(path, dpi=150, facecolor="white")
    figure.set_layout_engine("none")  # as it lies now


def inline_svg(figure: Figure, prefix: str, tips: Sequence[str], label: str) -> str:
    """The figure as an element of a page: exchangeable colours, unique ids, the page's fonts.

    tips: for each series, by number, what a pointer that rests on it is told; escaped.
    label: what a screen reader says; escaped.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")

    def tag(found: re.Match[str]) -> str:
        number = int(found[1])
        return f'<g data-series="{number}"><title>{tips[number]}</title>'

    text = re.sub(rf'<g id="{prefix}-series-(\d+)-[^"]*">', tag, text)
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def ramp(*stops: Colour) -> list[Colour]:
    """256 colours from stop to stop; their alpha lets the page's own ground shine through.

    >>> len(ramp((0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)))
    256
    """
    places = np.linspace(0.0, len(stops) - 1.0, 256)
    channels = [np.interp(places, range(len(stops)), values) for values in zip(*stops, strict=True)]
    return [(float(r), float(g), float(b), float(a)) for r, g, b, a in zip(*channels, strict=True)]


INTENSITY = ListedColormap(
    ramp(
        (0.13, 0.53, 0.75, 0.10),
        (0.13, 0.49, 0.72, 0.75),
        (0.45, 0.33, 0.62, 0.95),
        (0.85, 0.25, 0.20, 1.00),
    )
)
"""From faint to strong, for what is never below zero."""
SIGNED = ListedColormap(
    [
        *ramp((0.82, 0.33, 0.03, 1.0), (0.82, 0.33, 0.03, 0.0)),
        *ramp((0.08, 0.42, 0.75, 0.0), (0.08, 0.42, 0.75, 1.0)),
    ]
)
"""Orange below zero, nothing at zero, blue above."""


def power_of_ten(value: float) -> str:
    """A number of one digit and its power of ten, as people write it.

    >>> power_of_ten(1e-08), power_of_ten(2e-08), power_of_ten(100.0), power_of_ten(0.05)
    ('10⁻⁸', '2·10⁻⁸', '100', '0.05')
    """
    digits, _, exponent = f"{value:.0e}".partition("e")
    if -3 <= int(exponent) <= 3:
        return f"{value:g}"
    factor = "" if digits == "1" else f"{digits}·"
    return f"{factor}10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around a range of positive numbers, at least one apart.

    >>> decades(3e-8, 6e-8), decades(0.01, 0.01)
    ((1e-08, 1e-07), (0.01, 0.1))
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return float(f"1e{first}"), float(f"1e{max(last, first + 1)}")


def logarithmic_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Where to label a logarithmic axis: at powers of ten, or between them where there are few.

    >>> logarithmic_ticks(2e-8, 3e-1, most=4)
    [1e-07, 1e-05, 0.001, 0.1]
    >>> logarithmic_ticks(3.0, 40.0)
    [5.0, 10.0, 20.0]
    """
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers = [float(f"1e{k}") for k in exponents]
    within = [power for power in powers if low <= power <= high]
    if len(within) >= 2:
        return within[:: math.ceil(len(within) / most)]
    between = [factor * power for power in powers for factor in (1, 2, 5)]
    return [value for value in between if low <= value <= high]


def make_logarithmic(
    axes: Axes, which: str, low: float, high: float, in_bytes: bool = False
) -> None:
    """A logarithmic x or y axis from low to high, with a little room at both ends."""
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(FixedLocator(logarithmic_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    write = human_bytes if in_bytes else power_of_ten
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())
    room = (high / low) ** 0.06 if high > low else 2.0
    getattr(axes, f"set_{which}lim")(low / room, high * room)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def bytes_axis(axis: Axis) -> None:
    """Ticks as B, kB, MB or GB."""
    axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(abs(value))))


def short(text: str, most: int = 26) -> str:
    """At most so many characters, on one line.

    >>> short("a  long name", 7)
    'a long…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"
