"""`bouquet report`: runs that are already there, on one page."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from core.errors import UsageError
from journal.results import Run as ReadRun
from journal.run_folder import RunFolder
from settings.run import run_settings
from simulations.comparison_folder import Entry, open_comparison
from tests.conftest import Run


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[ReadRun]]:
    """In place of the pages: where each would be, and the runs on it."""
    pages: dict[Path, list[ReadRun]] = {}

    def write_report(folder: Path, runs: Sequence[ReadRun]) -> Path:
        pages[folder] = list(runs)
        return folder / "report.html"

    module = ModuleType("reports.page")
    module.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reports.page", module)
    return pages


def write_run(folder: Path, strategy: str, seed: int = 0) -> None:
    run = RunFolder(folder)
    run.create(run_settings({"strategy.name": strategy, "seed": seed}))
    run.append({"round": 0, "held_out_loss": 2.0})


def test_runs_go_on_one_page(bouquet: Run, page: dict[Path, list[ReadRun]]) -> None:
    write_run(Path("a"), "flora")
    write_run(Path("b"), "fedavg")
    code, out, _ = bouquet("report", "a", "b")
    assert code == 0
    assert "2 runs on one page: reports/001/report.html" in out
    assert bouquet("report", "a", "b", "--output", "mine")[0] == 0
    assert bouquet("report", "a", "a")[0] == 0
    assert {folder: [run.name for run in runs] for folder, runs in page.items()} == {
        Path("reports/001"): ["flora"],
        Path("mine"): ["flora", "fedavg"],
    }


def test_two_runs_of_one_name_and_seed_are_told_apart(
    bouquet: Run, page: dict[Path, list[ReadRun]]
) -> None:
    write_run(Path("a"), "flora")
    write_run(Path("b"), "flora")
    write_run(Path("c"), "fedavg", seed=0)
    write_run(Path("d"), "fedavg", seed=1)
    assert bouquet("report", "a", "b", "c", "d", "-o", "it")[0] == 0
    assert [run.name for run in page[Path("it")]] == [
        "flora (a)",
        "flora (b)",
        "fedavg",
        "fedavg",
    ]


def test_a_comparison_is_all_its_runs(bouquet: Run, page: dict[Path, list[ReadRun]]) -> None:
    comparison = open_comparison(Path("it"), ["flora", "fedavg"], 2, False, {"seed": 4})
    write_run(comparison.folder(Entry("flora", 4)), "flora", 4)
    comparison.finished(Entry("flora", 4))
    write_run(comparison.folder(Entry("flora", 5)), "flora", 5)
    comparison.failed(Entry("fedavg", 4), "ranks differ")
    assert bouquet("report", "it")[0] == 0
    assert [(run.name, run.seed, run.failure, len(run.rounds)) for run in page[Path("it")]] == [
        ("flora", 4, None, 1),
        ("flora", 5, "not yet finished", 1),
        ("fedavg", 4, "ranks differ", 0),
        ("fedavg", 5, "not yet run", 0),
    ]


def test_an_older_comparison_is_read_and_not_gone_on_with(
    bouquet: Run, page: dict[Path, list[ReadRun]]
) -> None:
    comparison = open_comparison(Path("the old one"), ["flora"], 1, False, {"seed": 4})
    write_run(comparison.folder(Entry("flora", 4)), "flora", 4)
    comparison.finished(Entry("flora", 4))
    file = Path("the old one/comparison.json")
    written = json.loads(file.read_text()) | {"format": "bouquet-comparison-1"}
    for later in ("data", "rates", "trials"):
        del written[later]
    file.write_text(json.dumps(written))
    before = file.read_bytes()
    assert bouquet("report", "the old one")[0] == 0
    assert [run.failure for run in page[Path("the old one")]] == [None]
    with pytest.raises(UsageError) as raised:
        open_comparison(Path("the old one"), ["flora"], 1, False, {"seed": 4, "new": 1})
    assert str(raised.value) == (
        "the old one was begun by another version of Bouquet and cannot be gone on with by this "
        "one (its format is bouquet-comparison-1, expected bouquet-comparison-2): choose another "
        "--output. What it holds can be read: `bouquet report 'the old one'` draws its runs"
    )
    assert file.read_bytes() == before
    file.write_text(json.dumps(written | {"format": "bouquet-comparison-9"}))
    with pytest.raises(UsageError, match=r"its format is 'bouquet-comparison-9', expected bouquet"):
        open_comparison(Path("the old one"), ["flora"], 1, False, {"seed": 4})


WRONG = {
    "no folder": (["nowhere"], "there is no folder nowhere"),
    "a file": (["file"], "there is no folder file"),
    "an empty folder": (["empty"], "there is no config.toml in empty"),
    "nothing": ([], "Missing argument 'RUN...'"),
    "a file to write into": (["run", "--output", "file"], "expects a folder, but file is a file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_run_is_one_message_and_exit_code_2(name: str, bouquet: Run) -> None:
    Path("empty").mkdir()
    Path("file").write_text("")
    write_run(Path("run"), "flora")
    arguments, message = WRONG[name]
    code, _, err = bouquet("report", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
