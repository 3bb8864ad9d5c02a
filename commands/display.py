"""What a simulation looks like in a terminal: one row a round, and where the run stands now.

On a terminal the rows grow above a live line; elsewhere (a file, a pipe, CI) each row is printed
once, as it is known.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from core.errors import listing, quoted
from core.units import counted, from_to, human_bytes
from journal.record import LOSS, OWN_LOSS, RoundRecord, value_of
from journal.run_folder import RunFolder
from server.admission import Rejection
from server.member import Member
from server.progress import RunObserver
from server.roster import Roster
from settings.run import RunSettings
from settings.site import client_name
from simulations.simulate import Plan
from strategies.registry import make_strategy
from tasks.reasons import count_lines

HELD_OUT, CLIENTS_LOSS = "held-out loss", "clients' loss"
COLUMNS = ("round", "train loss", HELD_OUT, "up", "down", "noise", "seconds")
WIDTHS = (7, 12, 15, 11, 11, 11, 10)
LONGEST_NOTE = 1000


def round_cells(record: RoundRecord, own: bool = False) -> list[str]:
    """One row of the table from one line of rounds.jsonl.

    own: the loss is the clients', on what each holds out, as in every row of such a run.
    """
    loss = value_of(record, OWN_LOSS if own else LOSS)
    base = record["round"] == 0
    seconds = value_of(record, "evaluate_seconds" if base else "seconds")
    return [
        "base" if base else str(record["round"]),
        shown(record.get("train_loss"), "{:.4f}"),
        shown(loss, "{:.4f}"),
        human_bytes(record["bytes_up"]) if "bytes_up" in record else "-",
        human_bytes(record["bytes_down"]) if "bytes_down" in record else "-",
        shown(record.get("aggregation_noise"), "{:.1e}"),
        shown(seconds, "{:.1f}"),
    ]


def shown(value: float | None, form: str) -> str:
    """A number in this form, or a dash where there is none.

    >>> shown(0.12345, "{:.2f}"), shown(None, "{:.2f}")
    ('0.12', '-')
    """
    return "-" if value is None else form.format(value)


def plan_panel(settings: RunSettings, plan: Plan, title: str, methods: str = "") -> Panel:
    """What is about to run, in a few lines.

    methods: what stands in the first line instead of the strategy of these settings.
    """
    properties = make_strategy(settings.strategy.name).properties
    ranks = settings.ranks()
    examples = plan.train_examples
    model, dealt = map(escape, (plan.model, _dealt(settings)))
    lines = [
        methods or f"[bold]{properties.title}[/]  [dim]{properties.source}[/]",
        f"{counted(len(ranks), 'client')} of rank {listing(ranks, limit=12)}; "
        f"{counted(settings.rounds, 'round')}"
        + (f", {settings.clients.fraction:.0%} each" if settings.clients.fraction < 1 else ""),
        f"model {model}: {plan.parameters / 1e6:.1f} M parameters, LoRA on {plan.modules} "
        f"modules, {plan.device}",
        *map(escape, plan.notes),
        f"data {_paths(plan.files)}: {counted(sum(examples), 'training example')} dealt "
        f"{dealt} ({from_to(examples)} each), {_held_out(plan)}",
        *(found for found in map(escape, plan.found)),
        *([_classes(plan.classes)] if plan.classes else []),
        f"each round a client takes {plan.steps} of "
        f"{counted(plan.epoch_steps, 'step')} of "
        f"{counted(settings.local.batch_size * settings.local.accumulation, 'example')}"
        + (", --steps 0 takes all" if plan.steps != plan.epoch_steps else ""),
    ]
    for prefix, counts in (("", plan.counts), ("held out: ", plan.held_out_counts)):
        for words in count_lines(counts, settings.data):
            lines.append(f"[yellow]{prefix}{escape(words)}[/]")
    if plan.unused:
        lines.append(
            f"[yellow]{plan.unused:,} examples held out that nobody evaluates: data.evaluation "
            "names the test set, data.held-out=auto would train on them[/]"
        )
    return Panel("\n".join(lines), title=title, title_align="left", expand=False)


def _paths(paths: Sequence[str]) -> str:
    """Files as a person would name them from here."""
    here = f"{Path.cwd()}/"
    return escape(listing([path.removeprefix(here) for path in paths], limit=3))


def _held_out(plan: Plan) -> str:
    count = f"{plan.held_out_examples:,}"
    words = (
        f"{count} in {_paths(plan.test_files)} to test" if plan.test_files else f"{count} held out"
    )
    clients = plan.held_out_by_clients
    return words + (f", {clients:,} by the clients" if clients else "")


def _classes(classes: Mapping[str, int]) -> str:
    each = [f"{label} ({count:,})" for label, count in classes.items()]
    return f"{len(classes)} classes: {escape(listing(each, limit=12))}"


def _dealt(settings: RunSettings) -> str:
    data = settings.data
    return {
        "iid": "at random",
        "natural": f"by {data.field}",
        "dirichlet": f"by Dirichlet({data.dirichlet_alpha:g}) over {data.field}",
        "files": "one file a client",
    }[data.partition]


class Display(RunObserver):
    """A RunObserver that draws, and a listener for the grid and the local trainer."""

    def __init__(self, console: Console, own: bool = False) -> None:
        """own: the loss in the table is the clients', on what each holds out."""
        self.console = console
        self._own = own
        self._columns = tuple(CLIENTS_LOSS if own and c == HELD_OUT else c for c in COLUMNS)
        self.folder: Path | None = None
        self._table = Table(box=None, padding=0, header_style="bold")
        for name, width in zip(self._columns, WIDTHS, strict=True):
            self._table.add_column(name, justify="right", width=width, no_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("[dim]{task.fields[detail]}[/]"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, detail="")
        self._client = ""
        self._rounds = self._asked = 0
        self._ranks: dict[str, int] = {}
        self._notes: list[str] = []

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw while the block runs, where there is a terminal to redraw."""
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._render, console=self.console, refresh_per_second=8) as live:
            try:
                yield
            finally:
                self._progress.update(self._task, visible=False)
                live.refresh()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        if self._table.row_count:
            notes = [Text(note, style="yellow") for note in self._notes]
            parts = [self._table, *notes, self._progress]
        return Group(*parts)

    def phase_started(self, phase: str) -> None:
        """Show what is being done when no client trains."""
        self._begin(phase, total=None)

    def _begin(self, description: str, total: int | None) -> None:
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, detail="")
        self._client = ""

    def run_opened(self, folder: Path, roster: Roster, done: int, rounds: int) -> None:
        """Remember folder and ranks; say where a resumed run stands."""
        self.folder, self._rounds, self._ranks = folder, rounds, roster.ranks
        if done >= rounds:
            text = f"finished already, after round {done}: --rounds {done + 2} goes on"
            self.console.print(text, markup=False)
        elif done:
            self.console.print(f"going on after round {done} of {rounds} in {folder}", markup=False)
        if not self.console.is_terminal:
            self.console.print(_line(self._columns))
        for record in RunFolder(folder).rounds():
            self._show(record)
        for client, reason in roster.left_out.items():
            self._note(f"{client} is left out: {reason}")

    def clients_came(self, joined: list[str], left_out: dict[str, str]) -> None:
        """In a simulation all are there from the beginning."""

    def round_started(self, server_round: int, cohort: list[Member]) -> None:
        """A fresh bar over the cohort."""
        self._begin(f"round {server_round} of {self._rounds}", total=len(cohort))
        self._asked = 0

    def on_message(self, kind: str, client: int) -> None:
        """The grid: this client begins on a message."""
        if kind.startswith("train"):
            name = client_name(client)
            self._client = f"{name}, rank {self._ranks.get(name, '?')}"
            self._progress.update(self._task, completed=self._asked, detail=self._client)
            self._asked += 1

    def on_step(self, step: int, steps: int) -> None:
        """The local trainer: so many steps done."""
        if self._client:
            detail = f"{self._client}, step {step}/{steps}"
            self._progress.update(self._task, detail=detail)
        else:
            detail = f"step {step}/{steps}"
            self._progress.update(self._task, total=steps, completed=step, detail=detail)

    def round_finished(self, record: RoundRecord, rejected: list[Rejection]) -> None:
        """One more row, and who was excluded."""
        for rejection in rejected:
            self._note(f"round {record['round']} excludes {rejection.client}: {rejection.reason}")
        self._show(record)

    def run_finished(self, folder: Path) -> None:
        """Nothing left to draw; the summary follows."""
        self.folder = folder

    def how_to_go_on(self, folder: Path) -> str:
        """The command of a simulation."""
        return f"go on with: {shlex.join(['bouquet', 'simulate', '--resume', str(folder)])}"

    def _show(self, record: RoundRecord) -> None:
        cells = round_cells(record, self._own)
        self._table.add_row(*cells)
        if not self.console.is_terminal:
            self.console.print(_line(cells))

    def _note(self, text: str) -> None:
        text = quoted(text, LONGEST_NOTE)
        if self.console.is_terminal:
            self._notes.append(text)
        else:
            self.console.print(text, style="yellow", soft_wrap=True, markup=False)


def _line(cells: Any) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
