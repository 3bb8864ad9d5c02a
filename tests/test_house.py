"""The design is a house: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# room -> rooms it may import; `late` are those that it may import inside a function only
ARROWS: dict[str, tuple[set[str], set[str]]] = {
    "adapters": (set(), set()),
    "settings": ({"adapters"}, set()),
    "strategies": ({"adapters"}, set()),
    "tasks": ({"adapters", "settings"}, set()),
    "client": ({"adapters", "settings", "tasks"}, set()),
    "server": ({"adapters", "settings", "strategies"}, {"tasks"}),
    "deployment": ({"adapters", "settings", "strategies", "server"}, {"tasks"}),
    "simulations": (
        {"adapters", "settings", "strategies", "tasks", "client", "server", "deployment"},
        set(),
    ),
    "bouquet": (
        {
            "adapters",
            "settings",
            "strategies",
            "tasks",
            "client",
            "server",
            "deployment",
            "simulations",
        },
        set(),
    ),
}
FILES = [path for room in ARROWS for path in sorted((ROOT / room).rglob("*.py"))]


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_along_the_arrows(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    early, late = ARROWS[room]
    tree = ast.parse(path.read_text())
    others = set(ARROWS) - {room}
    assert imported_rooms(tree, top_level_only=True) & others <= early
    assert imported_rooms(tree, top_level_only=False) & others <= early | late


@pytest.mark.parametrize("room", ["adapters", "settings", "strategies"])
def test_the_light_rooms_never_import_torch(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        heavy = {"torch", "transformers", "peft", "pyarrow"}
        assert not imported_rooms(ast.parse(path.read_text()), False) & heavy, path


@pytest.mark.parametrize("module", ["server.app", "server.flower_strategy", "simulations.cli"])
def test_starting_the_server_or_the_command_line_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print(sorted({'torch', 'transformers', 'peft', 'pyarrow', 'ray'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_room_says_what_it_is() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_unpickles() -> None:
    for path in FILES:
        imported = imported_rooms(ast.parse(path.read_text()), False)
        assert not imported & {"pickle", "dill", "cloudpickle", "shelve", "joblib"}, path
        assert "torch.load" not in path.read_text(), path
