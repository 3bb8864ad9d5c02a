"""What CONTRIBUTING.md says is played, and a new member is as few files as it says."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from journal.run_folder import RunFolder
from server.rounds import run_rounds
from strategies.registry import STRATEGIES, make_strategy
from strategies.strategy import Cohort, Update
from tests.adapter_generators import make_adapter
from tests.fake_clients import fake_grid, settings_of

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
NAME = "median_of_mine:CoordinateMedian"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The method of the guide, in a file of its own outside the repository."""
    found = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None
    (tmp_path / "median_of_mine.py").write_text(found[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "median_of_mine", raising=False)
    return tmp_path


def test_the_method_of_the_guide_is_its_formula(written: Path) -> None:
    shapes = {"q": (6, 8), "v": (4, 8)}
    updates = [Update(str(k), w, make_adapter(k, shapes, 3)) for k, w in enumerate((0.2, 0.5, 0.3))]
    strategy = make_strategy(NAME, shrink=0.5)
    start = strategy.aggregate(strategy.begin(updates[0].adapter), Cohort(updates)).model.start
    assert start is not None
    for name in shapes:
        three = sorted(float(u.adapter[name].scale * u.adapter[name].b[1, 2]) for u in updates)
        assert start[name].b[1, 2] == pytest.approx(0.5 * three[1], rel=1e-6)
        assert start[name].a[0, 3] == sorted(float(u.adapter[name].a[0, 3]) for u in updates)[1]


def test_the_method_of_the_guide_runs_and_its_knob_counts(written: Path) -> None:
    folders = []
    for shrink in (1.0, 0.25):
        settings = settings_of(
            written / f"run-{shrink}",
            strategy__name=NAME,
            lora__rank="2",
            rounds=2,
            strategy__shrink=shrink,
        )
        folders.append(run_rounds(fake_grid(settings), settings))
    norms = [RunFolder(folder).rounds()[-1]["ideal_change_norm"] for folder in folders]
    assert all(norm and np.isfinite(norm) for norm in norms)
    whole, less = ((folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert whole.read_bytes() != less.read_bytes()


def test_every_make_target_of_the_guide_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z]+)", GUIDE)) <= targets


# The methods that were added to prove that one is one file, and the file of each.
PROOF = {
    "fedprox": "fedprox",
    "scaffold": "scaffold",
    "fedavgm": "fedavgm",
    "fedadam": "fedadam",
    "fedyogi": "fedyogi",
    "raflora": "raflora",
    "fedsvd": "fedsvd",
    "fedrot-lora": "fedrot_lora",
}


def files_that_name(method: str) -> list[str]:
    """The files of all rooms in whose code, docstrings aside, the name of a method stands."""
    word = re.compile(rf"(?<![a-z0-9-]){re.escape(method)}(?![a-z0-9-])|\b{PROOF[method]}\b")
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    found = []
    for room in rooms:
        if room.name in ("tests", "tools", "benchmarks"):
            continue
        for path in sorted(room.rglob("*.py")):
            code = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
            if path.stem == PROOF[method] or word.search(code):
                found.append(str(path.relative_to(ROOT)))
    return sorted(found, key=lambda name: (Path(name).stem != PROOF[method], name))


def test_a_new_method_is_one_file_and_the_line_that_lists_it() -> None:
    rows = ["| method | files |", "| --- | --- |"]
    for method, file in PROOF.items():
        assert method in STRATEGIES
        files = files_that_name(method)
        assert files == [f"strategies/{file}.py", "strategies/registry.py"]
        rows.append(f"| `{method}` | {', '.join(f'`{name}`' for name in files)} |")
    table = "\n".join(rows)
    page = (ROOT / "docs" / "design.md").read_text()
    assert table in page, f"docs/design.md must hold this table:\n{table}"
