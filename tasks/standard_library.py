"""The Python standard library as a corpus: its source without docstrings, and its docstrings.

Every machine that runs Bouquet has this corpus on its disk, under the PSF licence, cut into about
170 top-level packages that differ in subject and style: a natural federation. The two readers are
complements, so what one is trained on does not give away what the other asks for:

    read_sources()     modules with every docstring cut out     pretraining of the base model
    read_docstrings()  (code without docstring, docstring)      federated fine-tuning

Both work on text and its syntax tree only, import nothing, and give the same result in the same
order on every machine that has the same Python version.
"""

import ast
import inspect
import sysconfig
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "test", "tests", "idle_test"})
# Written when Python was built: it holds that machine's paths and differs from one to the next.
SKIPPED_PREFIX = "_sysconfigdata"

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Edit = tuple[int, int, bytes]  # first byte, byte behind the last, what stands there instead


@dataclass(frozen=True)
class Docstring:
    """A function or class of the standard library and what its author wrote about it."""

    package: str
    """Top-level package or module, such as "json" or "argparse"."""
    name: str
    """Dotted qualified name, such as "json.decoder.JSONDecoder.decode"."""
    code: str
    """Dedented source, decorators and comments included, every docstring in it cut out."""
    text: str
    """The docstring, cleaned as by inspect.cleandoc; never empty."""


def read_docstrings(root: Path | None = None) -> list[Docstring]:
    """All non-empty docstrings of functions and classes under root, in a fixed order.

    root defaults to the standard library of the running Python. Files that cannot be decoded or
    parsed are passed over. Reading the whole library takes a few seconds.

    >>> first = read_docstrings(Path(ast.__file__).parent / "json")[0]
    >>> first.name, first.code[:14], first.text[:27]
    ('json.dump', 'def dump(obj, ', 'Serialize ``obj`` as a JSON')
    """
    found = []
    for module, text, tree in _modules(_library(root)):
        source, edits = text.encode(), _docstring_edits(text, tree)
        line_starts = _line_starts(source)
        for name, node in _definitions(tree, module):
            docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if any(character.isalnum() for character in docstring):
                code = _code(node, source, line_starts, edits)
                found.append(Docstring(module.partition(".")[0], name, code, docstring.strip()))
    return found


def read_sources(root: Path | None = None) -> list[tuple[str, str]]:
    """Pairs (dotted module name, source text without any docstring) under root, in a fixed order.

    Comments stay. A body that held nothing but its docstring becomes `...`, so each text parses.

    >>> dict(read_sources(Path(ast.__file__).parent / "json"))["scanner"].splitlines()[0]
    'import re'
    """
    return [
        (module, _apply(text.encode(), _docstring_edits(text, tree)).decode())
        for module, text, tree in _modules(_library(root))
    ]


def cut_docstrings(text: str) -> str:
    r"""Python source without the docstrings of its module, classes and functions.

    >>> cut_docstrings('def half(x):\n    "Divide by two."\n    return x / 2  # exact\n')
    'def half(x):\n    return x / 2  # exact\n'
    >>> cut_docstrings('class Stop(Exception): "Enough."')
    'class Stop(Exception): ...'
    """
    return _apply(text.encode(), _docstring_edits(text, ast.parse(text))).decode()


def _library(root: Path | None) -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) if root is None else root


def _modules(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(dotted name, text, syntax tree) of each readable module, ordered by its path's parts."""
    for path in sorted(_python_files(root), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with tokenize.open(path) as file:  # honours the file's declared encoding
                text = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules are not ours
                tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        yield name or root.name, text, tree


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            # A name with a dash or a dot holds build files or foreign packages, not a package.
            if entry.name.isidentifier() and entry.name not in SKIPPED_FOLDERS:
                yield from _python_files(entry)
        elif entry.suffix == ".py" and not entry.name.startswith(SKIPPED_PREFIX):
            yield entry


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """(qualified name, node) of every function and class below node, outer before inner.

    Only statements are visited: a definition never stands inside an expression.
    """
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        children = getattr(node, block, ())
        for child in children if isinstance(children, list) else ():
            name = prefix
            if isinstance(child, Definition):
                name = f"{prefix}.{child.name}"
                yield name, child
            yield from _definitions(child, name)


def _docstring_edits(text: str, tree: ast.Module) -> list[Edit]:
    """The edits, in order and disjoint, that take every docstring out of text."""
    source = text.encode()  # the syntax tree counts columns in UTF-8 bytes
    line_starts = _line_starts(source)
    edits = []
    for node in (tree, *(definition for _, definition in _definitions(tree, ""))):
        strings = _leading_strings(node.body)
        for i, string in enumerate(strings):
            assert string.end_lineno is not None
            assert string.end_col_offset is not None
            start = line_starts[string.lineno - 1] + string.col_offset
            end = line_starts[string.end_lineno - 1] + string.end_col_offset
            if i == 0 and len(strings) == len(node.body) and node is not tree:
                edits.append((start, end, b"..."))
            else:
                edits.append(_removal(source, start, end))
    return sorted(edits)


def _leading_strings(body: Sequence[ast.stmt]) -> list[ast.Expr]:
    """The docstring and any string statements behind it, of which the next would become one."""
    strings = []
    for statement in body:
        if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
            break
        if not isinstance(statement.value.value, str):
            break
        strings.append(statement)
    return strings


def _removal(source: bytes, start: int, end: int) -> Edit:
    """The edit that deletes the statement source[start:end] and leaves the rest parsable."""
    line_start = source.rfind(b"\n", 0, start) + 1
    line_end = _find_line_end(source, end)
    rest = source[end:line_end].lstrip()
    if rest.startswith(b";"):
        rest = rest[1:].lstrip()
    elif rest and not rest.startswith(b"#"):
        return start, end, b"..."  # such as a backslash: keep a statement where one stood
    if rest or source[line_start:start].strip():
        return start, line_end - len(rest), b""
    end = min(line_end + 1, len(source))
    while end < len(source) and not source[end : _find_line_end(source, end)].strip():
        end = min(_find_line_end(source, end) + 1, len(source))  # the blank lines behind it too
    return line_start, end, b""


def _code(
    node: Definition, source: bytes, line_starts: Sequence[int], edits: Sequence[Edit]
) -> str:
    """The definition's source lines after the edits, moved to the left margin.

    A definition is a compound statement, so whole lines belong to it, the comment behind its last
    statement included.
    """
    assert node.end_lineno is not None
    first_line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    start = line_starts[first_line - 1]
    end = _find_line_end(source, line_starts[node.end_lineno - 1])
    inside = edits[bisect_left(edits, (start,)) : bisect_left(edits, (end,))]
    lines = _apply(source[start:end], [(a - start, b - start, new) for a, b, new in inside])
    margin = source[start : start + node.col_offset].decode()
    # Not textwrap.dedent: one line of a string or a comment at the margin would stop it.
    return "\n".join(line.removeprefix(margin) for line in lines.decode().split("\n")).rstrip()


def _apply(source: bytes, edits: Sequence[Edit]) -> bytes:
    pieces, position = [], 0
    for start, end, replacement in edits:
        pieces += [source[position:start], replacement]
        position = end
    return b"".join([*pieces, source[position:]])


def _line_starts(source: bytes) -> list[int]:
    # Not splitlines: to Python's parser a form feed does not end a line.
    starts = [0]
    while (newline := source.find(b"\n", starts[-1])) >= 0:
        starts.append(newline + 1)
    return starts


def _find_line_end(source: bytes, position: int) -> int:
    newline = source.find(b"\n", position)
    return len(source) if newline < 0 else newline
