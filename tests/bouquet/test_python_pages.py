"""docs/python.md and docs/python.ipynb run as they stand."""

import os
import re
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.mark.filterwarnings("ignore:The attention mask")
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    with mpl.rc_context({"backend": "agg"}):
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert (tmp_path / "runs" / "flora-001" / "report.html").is_file()
    assert (tmp_path / "comparisons" / "001" / "report.html").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what drives the kernel
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_notebook_runs_and_shows_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(DOCS / "python.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "it is kept without its outputs"
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [
        (number, kind)
        for number, cell in enumerate(book.cells)
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    ]
    assert {(2, "text/html"), (3, "image/png"), (7, "text/html"), (8, "image/png")} <= {*shown}
    progress = "".join(output.get("text", "") for output in book.cells[1].outputs)
    assert re.search(r"^ +2 +\d\.\d+ +\d\.\d+", progress, re.MULTILINE), progress
