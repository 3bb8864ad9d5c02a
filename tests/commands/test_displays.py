"""What a terminal shows of odd names, long paths, and rounds without an evaluation."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from commands.comparison_display import ComparisonDisplay, round_line
from commands.display import Display, plan_panel
from server.progress import LogObserver
from settings.run import run_settings
from simulations.comparison_folder import Entry
from simulations.simulate import prepare
from tests.conftest import Run


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_name_with_markup_is_printed_as_it_is(
    tiny_model: Path, tiny_data: Path, width: int
) -> None:
    values = {"model.path": str(tiny_model), "data.path": str(tiny_data), "lora.rank": "2"}
    settings = run_settings(values, {"clients.count": 2, "data.context": 40})
    plan = prepare(settings)
    long = "/srv/a-long-folder-name/another-one-below-it/and-one-more/rows-[bold]-[/]-[red].jsonl"
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)
    panel = plan_panel(settings, replace(plan, model=long, files=[long]), "bouquet simulate")
    console.print(panel)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    inside = "".join(line.strip("│╭╮╰╯─").strip() for line in lines)
    assert inside.replace(" ", "").count(long) == 2


def test_one_is_no_plural_and_equal_parts_are_no_range(tiny_model: Path, tiny_data: Path) -> None:
    values = {"model.path": str(tiny_model), "data.path": str(tiny_data), "lora.rank": "2"}
    settings = run_settings(values, {"clients.count": 1, "data.context": 40, "rounds": 1})
    plan = replace(prepare(settings), train_examples=[12, 12])
    text = io.StringIO()
    Console(file=text, width=200).print(plan_panel(settings, plan, "bouquet simulate"))
    assert "1 client of rank 2; 1 round " in text.getvalue()
    assert "24 training examples dealt at random (12 each)" in text.getvalue()


def test_a_finished_run_without_an_adapter_names_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        LogObserver().run_finished(tmp_path)
        (tmp_path / "adapter").mkdir()
        LogObserver().run_finished(tmp_path)
    none, there = (record.getMessage() for record in caplog.records)
    assert none == "event=finished adapter=none"
    assert there == f"event=finished adapter={tmp_path}/adapter"


def test_a_round_without_an_evaluation_says_nothing_of_one() -> None:
    sizes = {"bytes_up": 1000, "bytes_down": 2000}
    assert round_line({"train_loss": 2.0, **sizes}) == "train 2.0000, 3 kB"
    evaluated = {"train_loss": 2.0, "held_out_loss": 1.5, **sizes}
    assert round_line(evaluated) == "train 2.0000, held-out 1.5000, 3 kB"
    own = {"train_loss": 2.0, "client_held_out_loss": 1.5, **sizes}
    assert round_line(own) == "train 2.0000, clients' own held-out 1.5000, 3 kB"


def test_the_live_lines_of_a_comparison_stand_below_each_other() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    display = ComparisonDisplay(console, 4, 3)
    display.run_began(Entry("flora", 0), run_settings())
    display.round_started(1, [])
    rendered = console.render_lines(display._render(), pad=False)
    lines = ["".join(segment.text for segment in line).strip() for line in rendered]
    assert len(lines) == 3
    assert lines[0].startswith("run 1 of 4")
    assert set(lines[1]) <= set("━╸╺")
    assert lines[2] == "flora, seed 0:   round 1 of 3"


def test_a_reason_is_wrapped_between_words_on_a_terminal_and_is_one_line_elsewhere() -> None:
    reason = "averages the factors entry by entry and needs one rank for all clients " * 3
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, width=60, force_terminal=terminal, color_system=None)
        ComparisonDisplay(console, 1, 1).run_ended(Entry("frlora", 0), reason)
        lines = text.getvalue().splitlines()
        assert (len(lines) > 1) == terminal
        words = {word for line in lines for word in line.split()}
        assert words == {"frlora,", "seed", "0:", *reason.split()}


def test_lines_of_a_comparison_between_evaluations(bouquet: Run, small_job: list[str]) -> None:
    code, out, _ = bouquet(
        *("compare", *small_job[1:], "-s", "flora", "--seeds", "1", "--rounds", "3"),
        *("--set", "evaluate.every=3"),
    )
    assert code == 0
    between = [line for line in out.splitlines() if line.startswith(("  round 1", "  round 2"))]
    assert len(between) == 2
    assert all("held-out" not in line and "train" in line for line in between)
    assert "held-out" in next(line for line in out.splitlines() if line.startswith("  round 3"))


@pytest.mark.parametrize("kind", ["simulation", "comparison"])
def test_a_reason_cannot_steer_the_terminal(kind: str) -> None:
    text = io.StringIO()
    console = Console(file=text, width=80)
    display = Display(console) if kind == "simulation" else ComparisonDisplay(console, 1, 1)
    note = display._note if isinstance(display, Display) else display._warn
    note("client-00: \x1b[2J[bold]" + "!" * 5000)
    assert r"client-00: \x1b[2J[bold]!!!" in text.getvalue()
    assert "\x1b" not in text.getvalue()
    assert len(text.getvalue()) < 1100
