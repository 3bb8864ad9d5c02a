"""Runs of the same job under several strategies and seeds, one after the other in this process.

Each goes the way of `bouquet simulate`: same base, same parts of the data, same batches and same
seeds. All that differs within a seed is strategy.name, and the learning rate where each method
chooses its own (simulations/tuning.py). One that is refused or fails does not stop the others.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from core.errors import BouquetError, UsageError, nearest
from journal.record import FILE, read_rounds
from journal.results import REFERENCES
from server.progress import RunObserver, observe_run
from settings.keys import Value
from settings.knobs import KNOBS, knobs_of, write_knobs
from settings.run import RunSettings, run_settings
from simulations.comparison_folder import Comparison, Entry
from simulations.simulate import prepare, simulate
from simulations.tuning import Tuning, final_loss
from strategies.registry import knobs_in, make_strategy, refuse_idle_knobs, strategy_names

log = logging.getLogger("bouquet")
ALL = "all"
NEUTRAL = "flora"
"""Takes any ranks: its settings stand for what all runs have in common."""
MOST_ROUNDS = 4
"""With equal bytes no run takes more than so many times the rounds that were asked for."""


class ComparisonObserver(RunObserver, Protocol):
    """Who watches a comparison: each run's rounds, and where one run ends and another begins."""

    def run_began(self, entry: Entry, settings: RunSettings) -> None:
        """The run is next, or goes on to equal bytes."""

    def run_ended(self, entry: Entry, failure: str | None) -> None:
        """It is whole after its rounds, or was refused or ended early for this reason."""

    def run_extended(self, entry: Entry, failure: str | None, within_budget: bool) -> None:
        """A round was added to it, or taken back because it exceeds the budget of bytes."""

    def run_kept(self, entry: Entry) -> None:
        """It was whole before."""

    def rate_chosen(self, name: str, tuning: Tuning) -> None:
        """All rates have been tried for this method."""

    def on_message(self, kind: str, client: int) -> None:
        """A client begins on a message."""

    def on_step(self, step: int, steps: int) -> None:
        """A client has taken a step."""


def choose_names(listed: str, ranks: Sequence[int]) -> list[str]:
    """The names in a list with commas; `all` stands for the strategies that take these ranks.

    >>> choose_names("all,local", [4, 2])[0], choose_names("fedavg,central", [4, 2])
    ('flora', ['fedavg', 'central'])
    """
    known = [*strategy_names(), *REFERENCES]
    names: list[str] = []
    for name in (part.strip() for part in listed.split(",")):
        if name == ALL:
            names += [each for each in strategy_names() if takes_ranks(each, ranks)]
        elif name in known or (":" in name and make_strategy(name)):
            names.append(name)
        else:
            near = nearest(name, [*known, ALL])
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UsageError(
                f"--strategies expects names with commas, out of {', '.join(known)}, or all; got "
                f"{name!r}{hint}"
            )
    return [*dict.fromkeys(names)]


def takes_ranks(name: str, ranks: Sequence[int]) -> bool:
    """Whether a strategy can work with clients of these ranks."""
    return make_strategy(name).properties.mixed_ranks or len(set(ranks)) == 1


class Runner:
    """Plays the runs of one comparison.

    layers: the configuration that all runs share, in the order in which layers are laid.
    """

    def __init__(
        self,
        comparison: Comparison,
        layers: Sequence[Mapping[str, Value]],
        observer: ComparisonObserver,
    ) -> None:
        self.comparison = comparison
        self.layers = layers
        names = [name for name in comparison.names if name not in REFERENCES]
        refuse_idle_knobs(shared_settings(layers).strategy.knobs, names)
        self.observer = observer

    def play(self) -> None:
        """Whatever is not done yet: the trials of rates, where there are some to choose from, then
        every run, then, with equal bytes, the cheaper ones on.

        Raises BouquetError only where the comparison itself cannot be kept.
        """
        for name in self.comparison.names if self.comparison.rates else ():
            self._tune(name)
        for entry in self.comparison.entries():
            if entry.key in self.comparison.done:
                self.observer.run_kept(entry)
                continue
            settings = self.settings(entry)
            self.observer.run_began(entry, settings)
            failure = self._without_a_rate(entry.name) or self._attempt(entry, settings)
            if failure is None:
                self.comparison.finished(entry)
            else:
                self.comparison.failed(entry, failure)
            self.observer.run_ended(entry, failure)
        if self.comparison.equal_bytes:
            for seed in sorted({entry.seed for entry in self.comparison.entries()}):
                self._spend_equally(seed)

    def _tune(self, name: str) -> None:
        """Try each rate with this method, and say which is chosen."""
        for entry in self.comparison.trial_entries(name):
            if entry.key in self.comparison.trials:
                self.observer.run_kept(entry)
                continue
            settings = self.settings(entry)
            self.observer.run_began(entry, settings)
            failure = self._attempt(entry, settings)
            records = read_rounds(self.comparison.folder(entry) / FILE)
            metric, loss = final_loss(name, records)
            if failure is None and loss is None:
                failure = "it has no finite held-out loss"
            self.comparison.tried(entry, metric, None if failure else loss, failure)
            self.observer.run_ended(entry, failure)
        tuning = self.comparison.tuning(name)
        assert tuning is not None
        self.observer.rate_chosen(name, tuning)

    def _without_a_rate(self, name: str) -> str | None:
        """Why a method cannot run: none of the rates that it could choose from trained."""
        tuning = self.comparison.tuning(name)
        if tuning is None or tuning.chosen is not None:
            return None
        return f"it failed at every rate of --tune-rates: {tuning.trials[0].failure}"

    def settings(self, entry: Entry, rounds: int | None = None) -> RunSettings:
        """The settings of one run: the shared ones, its strategy, its seed, its folder, its rate.

        A trial evaluates at its end only.
        """
        folder = self.comparison.folder(entry)
        strategy = NEUTRAL if entry.name in REFERENCES else entry.name
        own: dict[str, Value] = {
            "strategy.name": strategy,
            KNOBS: own_knobs(shared_settings(self.layers).strategy.knobs, strategy),
            "seed": entry.seed,
            "output": str(folder),
            "resume": (folder / "config.toml").is_file() and entry.name not in REFERENCES,
        }
        if rounds is not None:
            own["rounds"] = rounds
        tuning = self.comparison.tuning(entry.name)
        if entry.rate is not None:
            own |= {"local.learning-rate": entry.rate}
            own |= {"evaluate.every": int(self.comparison.config["rounds"])}
        elif tuning is not None and tuning.chosen is not None:
            own["local.learning-rate"] = tuning.chosen
        return run_settings(*self.layers, own)

    def _attempt(self, entry: Entry, settings: RunSettings) -> str | None:
        """Play a run to its end; why that failed, or None."""
        try:
            if entry.name in REFERENCES:
                self._play_reference(entry, settings)
            else:
                self._play_strategy(settings)
        except BouquetError as error:
            return str(error)
        except Exception as error:  # a bug in one method is that method's result
            log.exception("%s", entry)
            return f"{type(error).__name__}: {error}"
        return None

    def _play_strategy(self, settings: RunSettings) -> None:
        from client.training import observe_steps

        self.observer.phase_started("preparing")
        plan = prepare(settings)
        if not settings.resume:  # what a kill left of a folder before its configuration was written
            shutil.rmtree(settings.output, ignore_errors=True)
        with observe_run(self.observer), observe_steps(self.observer.on_step):
            simulate(plan.settings, self.observer.on_message, plan.data)

    def _play_reference(self, entry: Entry, settings: RunSettings) -> None:
        from client.training import observe_steps
        from simulations.references import run_reference

        with observe_run(self.observer), observe_steps(self.observer.on_step):
            for record in run_reference(entry.name, settings, self.observer.phase_started):
                self.observer.round_finished(record, [])

    def _spend_equally(self, seed: int) -> None:
        """Each run of a seed goes on for as long as it stays within the dearest one's bytes."""
        entries = [
            entry
            for entry in self.comparison.entries()
            if entry.seed == seed
            and entry.name not in REFERENCES
            and entry.key in self.comparison.done
        ]
        rounds = int(self.comparison.config["rounds"])
        budget = max((sum(self._bytes(entry)[:rounds]) for entry in entries), default=0)
        for entry in entries:
            if self.comparison.spent.get(entry.key) != budget:
                self._extend(entry, budget, rounds * MOST_ROUNDS)

    def _extend(self, entry: Entry, budget: int, most_rounds: int) -> None:
        """Add rounds one by one; one that turns out to exceed the budget is taken back."""
        folder = self.comparison.folder(entry)
        before = folder.with_name(f".{folder.name}-before")
        _restore(before, folder)
        failure = None
        while failure is None:
            spent = self._bytes(entry)
            if len(spent) >= most_rounds or sum(spent) + min(spent[-2:]) > budget:
                break
            _keep(folder, before)
            settings = self.settings(entry, len(spent) + 1)
            self.observer.run_began(entry, settings)
            failure = self._attempt(entry, settings)
            exceeded = failure is None and sum(self._bytes(entry)) > budget
            if exceeded or failure is not None:
                _restore(before, folder)
            shutil.rmtree(before, ignore_errors=True)
            self.observer.run_extended(entry, failure, not exceeded)
            if exceeded:
                break
        if failure is None:
            self.comparison.spent[entry.key] = budget
            self.comparison.finished(entry)
        else:
            self.comparison.failed(entry, f"while going on to equal bytes: {failure}")

    def _bytes(self, entry: Entry) -> list[int]:
        """What each round of a run sent, up and down."""
        records = read_rounds(self.comparison.folder(entry) / FILE)
        return [record["bytes_up"] + record["bytes_down"] for record in records[1:]]


def _keep(folder: Path, copy: Path) -> None:
    """A copy of a run's folder, whole or absent."""
    scratch = copy.with_name(f"{copy.name}-writing")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    scratch.rename(copy)


def _restore(copy: Path, folder: Path) -> None:
    """The folder as it was when the copy was made; nothing where there is no copy."""
    if copy.exists():
        shutil.rmtree(folder, ignore_errors=True)
        copy.rename(folder)


def own_knobs(text: str, strategy: str) -> str:
    """Of the knobs that all runs share, those that this method has."""
    chosen = knobs_of(text, strategy)
    having = {knob for knob, _, _ in knobs_in(strategy)}
    return write_knobs({knob: chosen[knob] for knob in chosen if knob in having})


def shared_settings(layers: Sequence[Mapping[str, Value]]) -> RunSettings:
    """The settings that stand for all runs."""
    settings = run_settings(*layers, {"strategy.name": NEUTRAL})
    return replace(settings, output="", resume=False)
