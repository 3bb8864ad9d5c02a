"""A report: one page to read without a network, and each of its figures as PNG and CSV.

FOLDER/report.html           everything inlined
FOLDER/figures/NAME.png      a figure, on white
FOLDER/figures/NAME.csv      the recorded numbers it is drawn from
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from core.errors import BouquetError, listing
from core.files import write_durably
from core.units import counted
from journal.record import LOSS
from journal.results import Run, summary_rows
from reports.figure_data import MARKERS, Series, line_up, noise_as_before, nowhere_drawn
from reports.figure_style import HUES, PHASES, Plot, inline_svg, styled, write_png
from reports.figures import SECTIONS, all_plots
from reports.page_summary import table
from reports.page_verdict import verdict
from settings.keys import flatten, shown_value
from settings.run import default_values, parse_ranks, run_settings

HERE = Path(__file__).resolve().parent
MOST_ROWS = 250
"""Rows of a figure's table that stand in the page; the file has all."""
APART = ("seed", "output", "resume", "strategy.name")
"""Keys that differ between the runs of any comparison."""
MARKER_PATHS = dict(
    zip(
        MARKERS,
        (
            "M17 2.5a3.5 3.5 0 1 0 .01 0z",
            "M13.9 2.9h6.2v6.2h-6.2z",
            "M17 2l3.9 7h-7.8z",
            "M17 1.8l4 4.2-4 4.2-4-4.2z",
            "M17 10l3.9-7h-7.8z",
            "M15.6 2h2.8v2.6H21v2.8h-2.6V10h-2.8V7.4H13V4.6h2.6z",
            "M15 2l2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2-2-2z",
        ),
        strict=True,
    )
)
"""Each marker as the path of a sample 34 wide and 12 high."""


def write_report(folder: Path, runs: Sequence[Run]) -> Path:
    """Write report.html and the figures' files into `folder`; the path of the page.

    Raises BouquetError where the disk will not take them.
    """
    if not runs:
        raise BouquetError("a report needs at least one run")
    lineup = line_up(runs)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        figures = _write_figures(folder / "figures", lineup)
        page = folder / "report.html"
        write_durably(page, _render(runs, lineup, figures).encode())
    except OSError as error:
        raise BouquetError(
            f"the report cannot be written to {folder}: {error.strerror or error}. The runs are "
            "untouched; free some space or choose another --output, and try again"
        ) from error
    return page


def _write_figures(folder: Path, lineup: Sequence[Series]) -> dict[str, list[dict[str, Any]]]:
    """Section -> its figures as the page needs them."""
    tips = [str(escape(series.name)) for series in lineup]
    sections: dict[str, list[dict[str, Any]]] = {key: [] for key in SECTIONS}
    with styled():
        for section, plot in all_plots(lineup):
            write_png(plot.figure, folder / f"{plot.name}.png", [s.name for s in lineup])
            write_durably(folder / f"{plot.name}.csv", csv_text(plot).encode())
            label = str(escape(f"{plot.title}. {plot.caption}"))
            sections[section].append(
                {
                    "plot": plot,
                    "svg": Markup(inline_svg(plot.figure, plot.name, tips, label)),
                    "rows": [[shown(value) for value in row] for row in plot.rows[:MOST_ROWS]],
                }
            )
    return {key: found for key, found in sections.items() if found}


def csv_text(plot: Plot) -> str:
    """The numbers of a figure, all their digits; an empty field where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plot.columns)
    writer.writerows(plot.rows)
    return text.getvalue()


def shown(value: Any) -> str:
    """A cell for people.

    >>> shown(3), shown(0.123456789), shown(None), shown("q_proj"), shown(1234567)
    ('3', '0.12346', '-', 'q_proj', '1,234,567')
    """
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def _render(
    runs: Sequence[Run], lineup: Sequence[Series], figures: Mapping[str, list[dict[str, Any]]]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = summary_rows(runs)
    columns, lines, base = table(rows, lineup)
    several = len(lineup) > 1
    return environment.get_template("report.html.jinja").render(
        title=_title(lineup),
        verdict=verdict(rows, lineup),
        facts=facts(runs, lineup),
        several=several,
        noise_as_before=noise_as_before(lineup),
        not_drawn=nowhere_drawn(lineup),
        lineup=lineup,
        samples={series.number: _sample(series) for series in lineup},
        columns=columns,
        lines=lines,
        base=base,
        sections=[(key, SECTIONS[key], found) for key, found in figures.items()],
        settings=settings_table(runs),
        differences=differences([(run, run.config) for run in runs]),
        versions=_common([run.versions for run in runs]),
        other_versions=differences([(run, run.versions) for run in runs]),
        tuning=tuning_table(runs),
        failures=failures(runs),
        ended=ended(runs),
        seeds=sorted({run.seed for run in runs}),
        colours=_colours(),
        style=Markup("".join((HERE / f"{name}.css").read_text() for name in ("palette", "report"))),
        script=Markup((HERE / "report.js").read_text()),
        most_rows=MOST_ROWS,
    )


def _title(lineup: Sequence[Series]) -> str:
    methods = [series for series in lineup if not series.reference]
    if len(lineup) == 1:
        return lineup[0].title
    if len(methods) == 1:
        return f"{methods[0].title} beside {listing([s.name for s in lineup if s.reference])}"
    return f"{len(methods)} strategies compared" if methods else "References"


def facts(runs: Sequence[Run], lineup: Sequence[Series]) -> list[str]:
    """What the runs are, in a few words each, from the configuration they share."""
    config = _common([run.config for run in runs])
    seeds = sorted({run.seed for run in runs})
    found = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}"]
    found.append(f"seed{'s' if len(seeds) > 1 else ''} {listing(seeds, limit=8)}")
    rounds = sorted({r.rounds[-1]["round"] for s in lineup for r in s.drawn if not s.reference})
    if rounds:
        most = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
        found.append(f"{most} round{'s' if rounds[-1] != 1 else ''}")
    if "clients.count" in config:
        text = counted(int(config["clients.count"]), "client")
        try:
            ranks = sorted(set(parse_ranks(str(config["lora.rank"]))), reverse=True)
            text += f" of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        except (KeyError, ValueError):
            pass
        found.append(text)
    for key in ("model.path", "data.path"):
        if config.get(key):
            found.append(f"{key.partition('.')[0]} {config[key]}")
    return found


def _common(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all agree on."""
    return {
        key: value
        for key, value in found[0].items()
        if all(key in other and other[key] == value for other in found)
    }


def settings_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every key that all runs agree on, with its default where it differs from it."""
    try:
        defaults = flatten(run_settings({}))
    except BouquetError:
        defaults = default_values()
    common = _common([run.config for run in runs])
    return [
        {
            "key": key,
            "value": shown_value(value),
            "default": shown_value(defaults[key]) if key in defaults else "",
            "changed": key not in APART and key in defaults and defaults[key] != value,
        }
        for key, value in common.items()
        if key not in ("output", "resume")
    ]


def differences(found: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Keys in which runs differ, with the runs of each value."""
    listed = []
    for key in dict.fromkeys(key for _, values in found for key in values if key not in APART):
        groups: dict[str, list[str]] = {}
        for run, values in found:
            value = shown_value(values[key]) if key in values else "not there"
            groups.setdefault(value, []).append(run.name)
        if len(groups) > 1:
            named = [
                (value, listing(dict.fromkeys(who), limit=20)) for value, who in groups.items()
            ]
            listed.append({"key": key, "groups": named})
    return listed


def tuning_table(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The final loss of each method at each rate that it chose from; None where nothing was tuned.

    Methods that chose the end of the list are named: a better rate may lie beyond it.
    """
    tuned = {run.name: run.tuning for run in runs if run.tuning is not None}
    if not tuned:
        return None
    rates = sorted({trial["rate"] for each in tuned.values() for trial in each["trials"]})
    lines = []
    for name, each in tuned.items():
        losses = {trial["rate"]: trial["loss"] for trial in each["trials"]}
        cells = [
            {
                "text": ("failed" if losses[rate] is None else f"{losses[rate]:.4f}")
                if rate in losses
                else "",
                "chosen": rate == each["chosen"],
            }
            for rate in rates
        ]
        own = each["metric"] != LOSS
        lines.append({"name": name, "cells": cells, "own": own})
    at_end = [name for name, each in tuned.items() if each["at_end_of_list"]]
    return {
        "rates": [f"{rate:g}" for rate in rates],
        "lines": lines,
        "seeds": listing(sorted({each["seed"] for each in tuned.values()})),
        "at_end": listing(at_end, limit=20) if at_end else "",
        "own": listing([line["name"] for line in lines if line["own"]], limit=20),
    }


def failures(runs: Sequence[Run]) -> list[tuple[str, int, int, str, str]]:
    """Replies that did not count: strategy, seed, round, client, reason."""
    return [
        (
            run.name,
            run.seed,
            record["round"],
            str(failure.get("client", "")),
            str(failure.get("reason", "")),
        )
        for run in runs
        for record in run.rounds
        for failure in record.get("failures") or []
    ]


def ended(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Runs without a result: strategy, its seeds, and why."""
    groups: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        if run.failure is not None:
            groups.setdefault((run.name, run.failure), []).append(run.seed)
    return [(name, listing(seeds, 10), reason) for (name, reason), seeds in groups.items()]


def _sample(series: Series) -> Markup:
    """A short piece of a series' line with its marker."""
    dash = " ".join(f"{1.6 * part:g}" for part in series.dash) or "none"
    marker = "" if series.reference else MARKER_PATHS[series.marker]
    hue = next((k for k, (light, _) in enumerate(HUES) if light == series.colour), None)
    colour = "var(--reference)" if hue is None else f"var(--hue-{hue})"
    return Markup(
        f'<svg class="sample" viewBox="0 0 34 12" aria-hidden="true" style="color:{colour}">'
        f'<path d="M1 6h32" stroke="currentColor" stroke-width="2" stroke-dasharray="{dash}"/>'
        f'<path d="{marker}" fill="currentColor"/></svg>'
    )


def _colours() -> dict[str, str]:
    """CSS declarations of the figures' colours on a light and on a dark page."""
    pairs = [
        *((f"hue-{k}", pair) for k, pair in enumerate(HUES)),
        *((f"phase-{k}", pair) for k, pair in enumerate(PHASES)),
    ]
    return {
        mode: ";".join(f"--{name}:{pair[which]}" for name, pair in pairs)
        for which, mode in enumerate(("light", "dark"))
    }
