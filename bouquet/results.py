"""What a call returns: a run or a comparison in its folder, as tables, figures and models."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bouquet.process import process_as_found
from bouquet.rooms import at_home
from core.errors import BouquetError, UsageError, listing, nearest
from journal import results
from journal.record import FILE, read_rounds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Run:
    """One run in its folder; everything is read anew from there, so a run under way can be watched.

    Raises UsageError where the folder holds no run.
    """

    @at_home()
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.strategy = results.read_run(self.folder).name

    @at_home()
    def __repr__(self) -> str:
        done = [record for record in self.records if record["round"] > 0]
        loss = next((r[k] for r in reversed(done) for k in LOSSES if r.get(k) is not None), None)
        ended = "" if loss is None else f", held-out loss {loss:.4f}"
        return f"<Run {self.strategy} in {self.folder}: {len(done)} rounds{ended}>"

    @property
    @at_home()
    def keys(self) -> dict[str, Any]:
        """Every key of the run's configuration, flat: `run.keys["local.epochs"]`."""
        return dict(results.read_run(self.folder).config)

    @property
    @at_home()
    def records(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl with all that they hold, clients included; round 0 first."""
        return [{**record} for record in read_rounds(self.folder / FILE)]

    @property
    @at_home()
    def rounds(self) -> "pd.DataFrame":
        """One row a round, round 0 being the base model; losses in nats a token, bytes, seconds."""
        frame = _pandas().DataFrame(list(results.round_rows(results.read_run(self.folder))))
        return frame.set_index("round") if len(frame) else frame

    @property
    @at_home()
    def clients(self) -> "pd.DataFrame":
        """One row for each round and client that counted."""
        rows = [
            {"round": record["round"], **client}
            for record in self.records
            for client in record.get("clients", [])
        ]
        return _pandas().DataFrame(rows)

    @property
    def adapter(self) -> Path:
        """The folder of the global model as a PEFT adapter.

        Raises BouquetError where the run has none: it is not finished, or its models are personal.
        """
        folder = self.folder / "adapter"
        if not folder.is_dir():
            raise BouquetError(
                f"{self.folder} has no adapter: the run is not finished, or its method leaves each "
                "client a model of its own"
            )
        return folder

    @at_home()
    @process_as_found()
    def model(self, device: str = "auto") -> Any:
        """The tuned model: the run's base with the adapter beside it, a PeftModel in eval mode.

        `model.merge_and_unload()` folds the adapter into a base in float32.
        """
        from peft import PeftModel

        base = self._base(device)
        base.model.config.use_cache = True
        return PeftModel.from_pretrained(base.model, str(self.adapter)).eval()

    @at_home()
    @process_as_found()
    def tokenizer(self) -> Any:
        """The tokenizer of the run's base."""
        return self._base("cpu").tokenizer

    @at_home()
    def plot(self, figure: str = "") -> "Figure":
        """A figure of the run by its name; by default the first, its held-out curve."""
        return _figure([results.read_run(self.folder)], figure)

    @property
    @at_home()
    def figures(self) -> list[str]:
        """The names of the figures that this run has numbers for."""
        return list(_plots([results.read_run(self.folder)]))

    @property
    @at_home()
    def report(self) -> Path:
        """One page about the run, to read without a network; written now."""
        from reports.page import write_report

        return write_report(self.folder, [results.read_run(self.folder)])

    def _base(self, device: str) -> Any:
        from journal.run_folder import read_config
        from models.base_model import load_base_model
        from settings.run import run_settings

        settings = run_settings(read_config(self.folder / "config.toml"))
        model, labels = settings.model, settings.data.listed_labels()
        return load_base_model(
            model.path, model.dtype, device, labels, model.trust_remote_code, model.quantization
        )


class Comparison:
    """Several strategies and seeds of one job, in their folder."""

    @at_home()
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self._read()

    def __repr__(self) -> str:
        names = dict.fromkeys(run.strategy for run in self.runs)
        return f"<Comparison of {', '.join(names)} in {self.folder}: {len(self.runs)} runs>"

    @cached_property
    @at_home()
    def runs(self) -> list[Run]:
        """Each run that began, in the order of strategies."""
        return [Run(run.folder) for run in self._read() if (run.folder / "config.toml").is_file()]

    @property
    @at_home()
    def table(self) -> "pd.DataFrame":
        """One row a strategy over its seeds, the best first: each metric's mean and deviation.

        The deviation is that of the sample; it is 0 for one seed, and `seeds` counts those whose
        runs are whole.
        """
        rows = []
        for row in results.summary_rows(self._read()):
            spreads: dict[str, float] = {}
            for name, spread in row.metrics.items():
                spreads |= {name: spread.mean, f"{name}_deviation": spread.deviation}
            rows.append({"strategy": row.name, "seeds": len(row.seeds), **spreads})
        return _pandas().DataFrame(rows).set_index("strategy")

    @property
    @at_home()
    def rounds(self) -> "pd.DataFrame":
        """One row for each strategy, seed and round."""
        rows = [
            {"strategy": run.name, "seed": run.seed, **row}
            for run in self._read()
            for row in results.round_rows(run)
        ]
        return _pandas().DataFrame(rows)

    @at_home()
    def plot(self, figure: str = "") -> "Figure":
        """A figure of all runs by its name; by default the first, the held-out curves."""
        return _figure(self._read(), figure)

    @property
    @at_home()
    def figures(self) -> list[str]:
        """The names of the figures that these runs have numbers for."""
        return list(_plots(self._read()))

    @property
    @at_home()
    def report(self) -> Path:
        """The page that compares the runs, to read without a network; written now."""
        from reports.page import write_report

        return write_report(self.folder, self._read())

    def _read(self) -> list[results.Run]:
        from simulations.comparison_folder import read_comparison

        return read_comparison(self.folder)


LOSSES = ("held_out_loss", "client_held_out_loss", "train_loss")


def _plots(runs: Sequence[results.Run]) -> dict[str, "Figure"]:
    from reports.figure_data import line_up
    from reports.figure_style import styled
    from reports.figures import all_plots

    with styled():
        return {plot.name: plot.figure for _, plot in all_plots(line_up(runs))}


def _figure(runs: Sequence[results.Run], name: str) -> "Figure":
    """The figure of this name; UsageError with the names that there are."""
    found = _plots(runs)
    name = name or next(iter(found), "")
    if name not in found:
        near = nearest(name, list(found))
        hint = f"; the nearest is {near[0]!r}" if near else ""
        names = listing(found, limit=20) or "none yet: no round has ended"
        raise UsageError(f"there is no figure {name!r}{hint}. These are: {names}")
    return found[name]


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise BouquetError(
            "tables need pandas: pip install 'bouquet[notebook]'. `run.records` has the same "
            "numbers as plain dictionaries"
        ) from None
    return pandas
