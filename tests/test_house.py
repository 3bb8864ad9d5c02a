"""The design is a house: who may import whom, and what stays light."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hatch_build
from deployment import trial

ROOT = Path(__file__).resolve().parent.parent
# room -> the rooms that it may import, and so whatever those may; and those that it may import
# inside a function only
NEXT: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), set()),
    "adapters": ({"core"}, set()),
    "settings": ({"core"}, set()),
    "wire": ({"adapters", "settings"}, set()),
    "strategies": ({"wire"}, set()),
    "tasks": ({"settings"}, set()),
    "models": ({"tasks", "adapters"}, set()),
    "journal": ({"strategies", "wire"}, set()),
    "client": ({"wire", "models"}, set()),
    "server": ({"wire", "strategies", "journal"}, {"models"}),
    "deployment": ({"settings", "journal", "server"}, {"models"}),
    "simulations": ({"client", "server"}, set()),
    "reports": ({"journal", "strategies"}, set()),
    "commands": ({"simulations", "reports", "deployment"}, set()),
    "bouquet": ({"commands"}, set()),
    "tools": ({"commands"}, set()),
    "benchmarks": ({"tools"}, set()),
}


def reached(rooms: set[str]) -> set[str]:
    """These rooms and all that they may import."""
    return rooms | {far for room in rooms for far in reached(NEXT[room][0])}


ARROWS = {room: (reached(early), reached(late)) for room, (early, late) in NEXT.items()}
ROOMS = set(ARROWS) - {"tools", "benchmarks"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
ALL = [path for room in ARROWS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_rooms(tree: ast.Module, top_level_only: bool) -> set[str]:
    nodes = ast.walk(tree) if not top_level_only else _outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *_outside_functions(child)]
    return found


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_along_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    early, late = ARROWS[room]
    tree = ast.parse(path.read_text())
    others = (set(ARROWS) | {"tests"}) - {room}
    assert imported_rooms(tree, top_level_only=True) & others <= early
    assert imported_rooms(tree, top_level_only=False) & others <= early | late


@pytest.mark.parametrize(
    "room", ["core", "adapters", "settings", "wire", "strategies", "journal", "reports"]
)
def test_the_light_rooms_never_import_torch(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        heavy = {"torch", "transformers", "peft", "pyarrow"}
        assert not imported_rooms(ast.parse(path.read_text()), False) & heavy, path


@pytest.mark.parametrize("module", ["server.app", "server.flower_strategy", "commands.cli"])
def test_starting_the_server_or_the_command_line_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'peft', 'pyarrow', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_room_is_built_into_wheel_bundle_and_checks() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders | {"tools"} == set(ARROWS)
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(hatch_build.ROOMS) == ROOMS - {"bouquet"}
    assert set(tables["mypy"]["packages"]) >= ROOMS
    assert set(tables["pytest"]["ini_options"]["testpaths"]) == ROOMS | {"tests"}
    bundle = {f"{room}/**/*.py" for room in ARROWS["client"][0] | ARROWS["server"][0]}
    bundle |= {"client/**/*.py", "server/**/*.py", "LICENSE"}
    assert set(tables["flwr"]["app"]["fab-include"]) == bundle
    assert {f"{room}/**/*.py" for room in trial.rooms_of_the_bundle()} | {"LICENSE"} == bundle


def test_every_room_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_unpickles() -> None:
    for path in FILES:
        imported = imported_rooms(ast.parse(path.read_text()), False)
        assert not imported & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, path
        assert "torch.load" not in path.read_text(), path
