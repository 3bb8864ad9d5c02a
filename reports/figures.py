"""All figures of a report, in the order of the page, and the section that each belongs to."""

from collections.abc import Callable, Iterator, Sequence

from reports.figure_bars import bytes_plot, clients_plot, seconds_plot
from reports.figure_change import change_plot
from reports.figure_curves import ABSCISSAS, effective_rank_plot, noise_plot, quality_plot
from reports.figure_data import Series
from reports.figure_maps import module_map, similarity_plot
from reports.figure_spectrum import spectrum_plot
from reports.figure_style import Plot

QUALITY, CHANGE, NOISE, RANK, CLIENTS, COST = (
    "quality",
    "change",
    "noise",
    "rank",
    "clients",
    "cost",
)
SECTIONS = {
    QUALITY: "How good the models are",
    CHANGE: "How far training moves",
    NOISE: "What aggregation loses",
    RANK: "What the adapters look like",
    CLIENTS: "How the clients fare",
    COST: "What it costs",
}
Maker = Callable[[Sequence[Series]], Plot | None]


def all_plots(lineup: Sequence[Series]) -> Iterator[tuple[str, Plot]]:
    """Each figure that these runs have numbers for, with its section.

    To be made and written under the settings of `figure_style.styled`.
    """
    makers: list[tuple[str, Maker]] = [
        *((QUALITY, _quality("held_out_accuracy", x)) for x in ABSCISSAS),
        (QUALITY, _quality("held_out_macro_f1", "rounds")),
        *((QUALITY, _quality("held_out_loss", x)) for x in ABSCISSAS),
        (QUALITY, _quality("client_held_out_loss", "rounds")),
        (CHANGE, change_plot),
        (NOISE, _quality("loss_before_aggregation", "rounds")),
        (NOISE, noise_plot),
        (NOISE, lambda found: module_map(found, "module_noise")),
        (NOISE, lambda found: module_map(found, "module_distribution_noise")),
        (RANK, spectrum_plot),
        (RANK, effective_rank_plot),
        (CLIENTS, clients_plot),
        (CLIENTS, similarity_plot),
        (COST, bytes_plot),
        (COST, seconds_plot),
    ]
    for section, make in makers:
        plot = make(lineup)
        if plot is not None:
            yield section, plot


def _quality(key: str, x: str) -> Maker:
    return lambda lineup: quality_plot(lineup, key, x)
