"""One name is installed, and other people's modules of a room's name stay theirs."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
import settings  # the script's own
import bouquet
light = "torch" not in sys.modules
run = bouquet.simulate(
    strategy="flora", ranks=[4, 2], rounds=1, steps=1, progress=False, **{"evaluate.server": False}
)
import adapters  # another library's
from adapters import hub
try:
    bouquet.simulate("florra", progress=False)
except bouquet.UsageError as error:
    refused = str(error)
print(json.dumps({
    "light": light,
    "settings": settings.MINE,
    "still": sys.modules["settings"] is settings,
    "adapters": adapters.NAME + hub.NAME,
    "run": str(run.folder),
    "rounds": len(run.records),
    "refused": refused,
    "rooms": sorted({"server", "strategies", "tasks"} & set(sys.modules)),
    "path": [place for place in sys.path if "bouquet" in place],
}))
"""


def built(folder: Path) -> Path:
    """The wheel."""
    build = "import sys; from hatchling.cli import hatchling; sys.exit(hatchling())"
    command = [sys.executable, "-c", build, "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, beside another library called `adapters`.

    Everything else is found in the environment of these tests, after it.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(built(folder))], check=True)
    installed = {path.name for path in site.iterdir()} - {"bin"}
    (about,) = (name for name in installed if name.endswith(".dist-info"))
    assert installed == {"bouquet", about}
    (site / "adapters").mkdir()
    (site / "adapters" / "__init__.py").write_text("NAME = 'Adapter'")
    (site / "adapters" / "hub.py").write_text("NAME = 'Hub'")
    others = Path(pytest.__file__).parent.parent
    (site / "others.pth").write_text(f"import sys; sys.path.append({str(others)!r})\n")
    return folder / "env" / "bin" / "python"


def ran(python: Path, folder: Path, *arguments: str) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_runs_beside_modules_of_the_same_names(python: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text("MINE = 'mine'")
    (tmp_path / "server").mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    told = json.loads(ran(python, tmp_path, "script.py").splitlines()[-1])
    assert told["light"]
    assert (told["settings"], told["still"], told["adapters"]) == ("mine", True, "AdapterHub")
    assert (told["rounds"], Path(told["run"]).parent) == (2, tmp_path / "runs")
    assert "strategy must be one of flora" in told["refused"]
    assert (told["rooms"], told["path"]) == ([], [])


def test_the_command_runs_beside_them_too(python: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text("raise SystemExit('the script of somebody')")
    assert "flora-warm" in ran(python, tmp_path, "-m", "bouquet", "strategies")
    start = "from bouquet.launch import main; main()"
    assert "local.batch-size" in ran(python, tmp_path, "-c", start, "options")


def test_a_trial_has_its_app_from_the_installed_package(python: Path, tmp_path: Path) -> None:
    code = (
        "from bouquet.rooms import move_in; move_in(); from pathlib import Path; "
        "from deployment import trial; Path('app').mkdir(); trial._write_app(Path('app'))"
    )
    ran(python, tmp_path, "-c", code)
    held = {path.name for path in (tmp_path / "app").iterdir()}
    assert {"pyproject.toml", "LICENSE", "server", "client", "strategies"} <= held
    assert not list((tmp_path / "app").rglob("*.safetensors"))


def test_a_superlink_finds_the_plugin_of_its_database(python: Path, tmp_path: Path) -> None:
    code = (
        "from sqlalchemy import create_engine; "
        "print(create_engine('sqlite:///a.db?plugin=bouquet').pool.size())"
    )
    assert ran(python, tmp_path, "-c", code) == "1\n"


def test_who_is_in_the_way_is_named(python: Path, tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'adapters':\n"
        "            return importlib.util.spec_from_file_location(name, 'mine.py')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import bouquet\n"
        "try:\n    bouquet.open('.')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    (tmp_path / "mine.py").write_text("")
    said = ran(python, tmp_path, "-c", code)
    assert f"Python finds {tmp_path}/mine.py. Uninstall one of the two" in said
