"""What a comparison looks like in a terminal: where it stands, and the table at its end.

On a terminal a line a run grows above a live one; elsewhere each round is a line, too.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from commands.display import LONGEST_NOTE
from core.errors import quoted
from core.units import human_bytes
from journal.record import ACCURACY, LOSS, OWN_ACCURACY, OWN_LOSS, RoundRecord
from journal.results import Spread, SummaryRow, headline_metric
from server.admission import Rejection
from server.member import Member
from server.progress import RunObserver
from server.roster import Roster
from settings.run import RunSettings
from settings.site import client_name
from simulations.comparison_folder import Entry
from simulations.tuning import Tuning


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> human_seconds(7.3), human_seconds(192), human_seconds(7500)
    ('7 s', '3 min 12 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def round_line(record: RoundRecord) -> str:
    """One round in one line; without a loss where the round was not evaluated.

    >>> round_line({"train_loss": 2.5, "bytes_up": 1000, "bytes_down": 2000})
    'train 2.5000, 3 kB'
    """
    words = []
    if (loss := record.get("held_out_loss")) is not None:
        words.append(f"held-out {loss:.4f}")
    elif (own := record.get("client_held_out_loss")) is not None:
        words.append(f"clients' own held-out {own:.4f}")
    if (accuracy := record.get("held_out_accuracy")) is not None:
        words.append(f"accuracy {accuracy:.3f}")
    if (trained := record.get("train_loss")) is not None:
        words.insert(0, f"train {trained:.4f}")
    if "bytes_up" in record:
        words.append(human_bytes(record["bytes_up"] + record["bytes_down"]))
    return ", ".join(words)


class ComparisonDisplay(RunObserver):
    """A ComparisonObserver that draws."""

    def __init__(self, console: Console, runs: int, rounds: int) -> None:
        self.console = console
        self._runs, self._rounds = runs, rounds
        self._number = self._kept = self._ended = 0
        self._entry = ""
        self._upto = rounds
        self._done = 0
        self._last = self._now = ""
        self._began = time.monotonic()

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw while the block runs, where there is a terminal to redraw."""
        if not self.console.is_terminal:
            yield
            return
        live = Live(
            get_renderable=self._render,
            console=self.console,
            refresh_per_second=4,
            transient=True,
        )
        with live:
            yield

    def _render(self) -> RenderableType:
        elapsed = human_seconds(time.monotonic() - self._began)
        head = f"run {self._number} of {self._runs}, {elapsed} so far{self._estimate()}"
        bar = ProgressBar(total=1.0, completed=self._share(), width=30)
        where = f"{self._entry}: {self._last}  {self._now}"
        bar_line = Padding(bar, 0)  # a bar alone ends without a line break
        return Group(Text(head, style="bold"), bar_line, Text(where, style="dim", no_wrap=True))

    def _share(self) -> float:
        """How much of the comparison is done, counted in rounds."""
        current = min(self._done / max(self._upto, 1), 1.0)
        return min((self._kept + self._ended + current) / max(self._runs, 1), 1.0)

    def _estimate(self) -> str:
        """How long the rest will take at the speed so far."""
        kept = self._kept / max(self._runs, 1)
        played, left = self._share() - kept, 1.0 - self._share()
        if played <= 0.0 or left <= 0.0:
            return ""
        elapsed = time.monotonic() - self._began
        return f", about {human_seconds(elapsed * left / played)} to go"

    def run_began(self, entry: Entry, settings: RunSettings) -> None:
        """Count it, unless it only goes on."""
        extended = settings.rounds > self._rounds
        self._number = min(self._number + (not extended), self._runs)
        self._entry, self._upto, self._done = str(entry), settings.rounds, 0
        self._last = self._now = ""
        if not self.console.is_terminal and not extended:
            self._print(f"run {self._number} of {self._runs}: {entry}")

    def run_ended(self, entry: Entry, failure: str | None) -> None:
        """One line: how it ended, and how long the rest will take."""
        self._done = 0
        self._ended += 1
        if failure is None:
            self._print(f"{entry}: {self._last}{self._estimate()}")
        else:
            self._warn(f"{entry}: {failure}")

    def run_extended(self, entry: Entry, failure: str | None, within_budget: bool) -> None:
        """One line: the round that was added, or why it was not."""
        self._done = 0
        if failure is not None:
            self._warn(f"{entry}, on to equal bytes: {failure}")
        elif within_budget:
            self._print(f"{entry}, on to equal bytes: round {self._upto}, {self._last}")
        else:
            self._print(f"{entry}: round {self._upto} would send too much and is taken back")

    def run_kept(self, entry: Entry) -> None:
        """Say that nothing is left to do for it."""
        self._number, self._kept = self._number + 1, self._kept + 1
        self._print(f"run {self._number} of {self._runs}: {entry} is done already")

    def rate_chosen(self, name: str, tuning: Tuning) -> None:
        """One line: the rate, the loss at each, and whether a better one may lie beyond."""
        losses = ", ".join(
            f"{t.rate:g}: {'failed' if t.loss is None else f'{t.loss:.4f}'}" for t in tuning.trials
        )
        if tuning.chosen is None:
            self._warn(f"{name}: every rate failed ({losses})")
            return
        self._print(f"{name}: takes rate {tuning.chosen:g} ({losses})")
        if tuning.at_end:
            self._warn(
                f"{name}: {tuning.chosen:g} is at the end of --tune-rates; a better rate may lie "
                "beyond it"
            )

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal, markup=False)

    def phase_started(self, phase: str) -> None:
        """Show it."""
        self._now = phase

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """Where a resumed run stands, and who is left out."""
        self._done = done
        if done < rounds <= self._rounds and done:
            self._print(f"  going on after round {done} of {rounds}")
        for client, reason in roster.left_out.items():
            self._warn(f"  {client} is left out: {reason}")

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        """In a simulation all are there from the beginning."""

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """Show it."""
        self._now = f"round {server_round} of {self._upto}"

    def on_message(self, kind: str, client: int) -> None:
        """Show which client works."""
        if kind.startswith("train"):
            self._now = f"round {self._done + 1} of {self._upto}, {client_name(client)}"

    def on_step(self, step: int, steps: int) -> None:
        """Show how far it is."""
        self._now = f"{self._now.partition(', step')[0]}, step {step}/{steps}"

    def round_finished(self, record: RoundRecord, rejected: list[Rejection]) -> None:
        """One line, and who was excluded."""
        self._done, self._last = record["round"], round_line(record)
        for rejection in rejected:
            self._warn(f"  round {self._done} excludes {rejection.client}: {rejection.reason}")
        if not self.console.is_terminal and self._upto <= self._rounds:
            self._print(f"  round {self._done} of {self._upto}: {self._last}")

    def _warn(self, text: str) -> None:
        wraps = self.console.is_terminal  # elsewhere a line stays whole, to be searched
        text = quoted(text, LONGEST_NOTE)
        self.console.print(text, style="yellow", soft_wrap=not wraps, markup=False)

    def run_finished(self, folder: Path) -> None:
        """The runner says more about it."""

    def how_to_go_on(self, folder: Path) -> str:
        """The command of the comparison that this run belongs to."""
        return "give the same bouquet compare command again, with --output of this comparison"


def results_table(rows: Sequence[SummaryRow]) -> Table:
    """One row a strategy, the best first.

    Where a method has personal models only, `own parts` is the mean over clients, each on its own
    held-out part, for all: of losses weighted by tokens, of accuracies each client counting once.
    """
    best = headline_metric(rows)
    classifies = best != LOSS
    own = "accuracy" if classifies else "loss"
    columns = {
        "held-out\nloss": (LOSS, "{:.4f}"),
        "accuracy": (ACCURACY, "{:.3f}"),
        "own\nparts": (OWN_ACCURACY if classifies else OWN_LOSS, "{:.3f}"),
        "worst\nclient": (f"worst_client_{own}", "{:.3f}"),
        "size of\nchange": ("mean_change_norm", "{:.3g}"),
        "bytes": ("bytes", ""),
        "rounds": ("rounds", "{:g}"),
        "seconds": ("seconds", "{:.1f}"),
        "noise": ("aggregation_noise", "{:.0e}"),
    }
    whole = [row for row in rows if row.seeds]
    if not classifies:
        del columns["accuracy"]
    if all(best in row.metrics for row in whole):
        del columns["own\nparts"]
    if len({count for row in whole for count in row.metrics["rounds"].values}) == 1:
        del columns["rounds"]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("strategy", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in whole:
        cells = [
            _cell(row, name, form, name == best and len(row.seeds) > 1)
            for name, form in columns.values()
        ]
        table.add_row(escape(row.name), *cells)
    return table


def _cell(row: SummaryRow, name: str, form: str, spreads: bool) -> str:
    spread: Spread | None = row.metrics.get(name)
    if spread is None:
        return "-"
    if name == "bytes":
        return human_bytes(spread.mean)
    mean = form.format(spread.mean)
    return f"{mean} ± {form.format(spread.deviation)}" if spreads else mean


def print_results(console: Console, rows: Sequence[SummaryRow]) -> None:
    """The table, and below it what was refused or failed, with the reason."""
    if any(row.seeds for row in rows):
        console.print()
        console.print(results_table(rows))
    for row in rows:
        for reason in dict.fromkeys(row.failures.values()):
            seeds = ", ".join(str(seed) for seed, said in row.failures.items() if said == reason)
            text = f"\n{row.name}, seed {seeds}: {reason}"
            console.print(text, style="yellow", markup=False, soft_wrap=not console.is_terminal)
