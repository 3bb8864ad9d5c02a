"""From the command line to the page, nothing in between replaced."""

import re
from pathlib import Path

from tests.conftest import Run


def test_a_comparison_ends_in_a_page_and_runs_make_one_again(
    bouquet: Run, small_job: list[str], tmp_path: Path
) -> None:
    job = ["compare", *small_job[1:], "--seeds", "1", "--set", "evaluate.trained=true"]
    code, out, errors = bouquet(*job, "-s", "flora-warm,fedavg,zero-padding,central,local")
    assert code == 0, errors
    folder = tmp_path / "comparisons" / "001"
    assert str(folder.relative_to(tmp_path) / "report.html") in out
    page = (folder / "report.html").read_text()
    for name in ("flora-warm", "zero-padding", "central", "local"):
        assert name in page
    assert "needs one rank for all clients" in page  # why fedavg was refused
    for figure in ("loss-rounds", "loss-before-rounds", "noise-of-modules", "rank-spectrum"):
        assert (folder / "figures" / f"{figure}.csv").stat().st_size > 40
        assert (folder / "figures" / f"{figure}.png").stat().st_size > 1000
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!arxiv\.org|github\.com)', page)

    run = folder / "runs" / "zero-padding" / "seed-0"
    assert bouquet("report", run, "--output", "alone")[0] == 0
    assert "zero-padding" in (tmp_path / "alone" / "report.html").read_text()


def test_a_report_of_nothing_says_what_it_wants(bouquet: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, errors = bouquet("report", tmp_path / "empty")
    assert code == 2
    assert "Traceback" not in errors
    assert "empty" in errors
