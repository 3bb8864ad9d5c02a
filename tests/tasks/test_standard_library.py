"""The corpus reader: exact results on small hand-written trees, properties on the real library."""

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from tasks.standard_library import Docstring, cut_docstrings, read_docstrings, read_sources

MODULE = '''\
# -*- coding: utf-8 -*-
"""The module."""

import functools


class Café:
    """Où l'on sert du café."""  # after the docstring

    size = "é"

    @functools.cache
    @staticmethod
    def pour(cup):  # into the cup
        r"""Pour.

            Twice.
        """

        # slowly
        def drop(): """One drop."""; return """text
at the margin"""
        return drop()  # done

    async def wash(self): "Wash it."


def empty():
    """   """
    return 1


def bare():
    return "not a docstring"
'''


def write_library(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library has invalid escapes
        return ast.parse(text)


def has_docstring(tree: ast.Module) -> bool:
    """Whether any node of the whole tree still has a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return any(ast.get_docstring(node, clean=False) is not None for node in nodes)


def without_docstrings(tree: ast.AST) -> str:
    """The oracle: the tree's dump after its leading strings are removed from the nodes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while node.body and isinstance(node.body[0], ast.Expr):
                value = node.body[0].value
                if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
                    break
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Expr(ast.Constant(...))]
    return ast.dump(tree)


@pytest.fixture(scope="module")
def library_sources() -> list[tuple[str, str]]:
    return read_sources()


@pytest.fixture(scope="module")
def library_docstrings() -> list[Docstring]:
    return read_docstrings()


def test_docstrings_of_a_small_module_are_exact(tmp_path: Path) -> None:
    write_library(tmp_path, {"drinks/hot.py": MODULE})
    pour = '''\
@functools.cache
@staticmethod
def pour(cup):  # into the cup
    # slowly
    def drop(): return """text
at the margin"""
    return drop()  # done'''
    cafe = (
        'class Café:\n    # after the docstring\n\n    size = "é"\n\n'
        + "".join(f"    {line}\n" for line in pour.split("\n")).replace("    at the", "at the")
        + "\n    async def wash(self): ..."
    )
    assert read_docstrings(tmp_path) == [
        Docstring("drinks", "drinks.hot.Café", cafe, "Où l'on sert du café."),
        Docstring("drinks", "drinks.hot.Café.pour", pour, "Pour.\n\nTwice."),
        Docstring(
            "drinks",
            "drinks.hot.Café.pour.drop",
            'def drop(): return """text\nat the margin"""',
            "One drop.",
        ),
        Docstring("drinks", "drinks.hot.Café.wash", "async def wash(self): ...", "Wash it."),
    ]


def test_source_of_a_small_module_loses_its_docstrings_and_nothing_else(tmp_path: Path) -> None:
    write_library(tmp_path, {"hot.py": MODULE})
    expected = MODULE
    for docstring, replacement in [
        ('"""The module."""\n\n', ""),
        ('"""Où l\'on sert du café."""  #', "#"),
        ('        r"""Pour.\n\n            Twice.\n        """\n\n', ""),
        ('"""One drop."""; ', ""),
        ('"Wash it."', "..."),
        ('    """   """\n', ""),
    ]:
        assert docstring in expected
        expected = expected.replace(docstring, replacement)
    assert read_sources(tmp_path) == [("hot", expected)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'a'", ""),
        ("'a'; x = 1", "x = 1"),
        ("('a'\n 'b')\nx = 1\n", "x = 1\n"),
        ("'a'\n'b'\nx = 1", "x = 1"),
        ("def f(): 'a'", "def f(): ..."),
        ("def f(): 'a'; 'b'; x  # c\n", "def f(): x  # c\n"),
        ("def f():\n    'a'; 'b'", "def f():\n    ...; "),
        ("def f(): 'é'; return 'é'", "def f(): return 'é'"),
        ("def f():\n    'a';\n    return 1", "def f():\n    return 1"),
        ("def f():\n    'a'; x = 1; y = 2", "def f():\n    x = 1; y = 2"),
        ("def f():\n    '''a\n    b'''\n\n\n    # c\n", "def f():\n    ...\n\n\n    # c\n"),
        ("class A:\n\t'a'\n\t# c\n\tx = 1", "class A:\n\t# c\n\tx = 1"),
        ("if x:\n  def f():\n    'a'\n    return 1", "if x:\n  def f():\n    return 1"),
        ("try: pass\nexcept E:\n def f(): 'a'", "try: pass\nexcept E:\n def f(): ..."),
        ("match x:\n case 1:\n  def f(): 'a'", "match x:\n case 1:\n  def f(): ..."),
        ("def f():\n    f'a'", "def f():\n    f'a'"),
        ("def f():\n    b'a'", "def f():\n    b'a'"),
        ("x = 1\n\x0c\ndef f(): 'a'", "x = 1\n\x0c\ndef f(): ..."),
    ],
)
def test_cut(text: str, expected: str) -> None:
    assert cut_docstrings(text) == expected
    assert without_docstrings(ast.parse(expected)) == without_docstrings(ast.parse(text))


def test_a_docstring_that_cannot_be_deleted_becomes_an_ellipsis() -> None:
    text = "class A:\n    'a' \\\n    ; x = 1\n"
    assert cut_docstrings(text) == text.replace("'a'", "...")
    assert not has_docstring(parse(cut_docstrings(text)))


def test_names_order_and_what_is_skipped(tmp_path: Path) -> None:
    code = b'def f(): "Doc."\n'
    kept = ["a/__init__.py", "a/b/c.py", "a/z.py", "a_.py", "z.py"]
    skipped = [
        "a/test/t.py",
        "a/tests/t.py",
        "site-packages/p/__init__.py",
        "z/idle_test/t.py",
        "__pycache__/y.py",
        "config-3.11-x86_64/c.py",
        "_sysconfigdata__linux_.py",
        "notes.txt",
    ]
    write_library(tmp_path, dict.fromkeys(reversed(kept + skipped), code))
    broken = {"bad_syntax.py": b"def", "bad_bytes.py": b"'\xff'", "null.py": b"x = 1\0"}
    write_library(tmp_path, broken)
    names = ["a", "a.b.c", "a.z", "a_", "z"]
    assert [name for name, _ in read_sources(tmp_path)] == names
    found = read_docstrings(tmp_path)
    assert [docstring.name for docstring in found] == [f"{name}.f" for name in names]
    assert [docstring.package for docstring in found] == ["a", "a", "a", "a_", "z"]


def test_declared_encoding_and_windows_line_ends(tmp_path: Path) -> None:
    text = "# coding: latin-1\r\ndef f():\r\n    'é'\r\n    return 'ü'\r\n"
    write_library(tmp_path, {"m.py": text.encode("latin-1"), "n.py": b"\xef\xbb\xbf'a'\nx = 1\n"})
    assert read_sources(tmp_path) == [
        ("m", "# coding: latin-1\ndef f():\n    return 'ü'\n"),
        ("n", "x = 1\n"),
    ]
    assert read_docstrings(tmp_path) == [Docstring("m", "m.f", "def f():\n    return 'ü'", "é")]


def test_every_source_of_the_library_parses_without_docstrings(
    library_sources: list[tuple[str, str]],
) -> None:
    assert len(library_sources) > 500
    assert [name for name, text in library_sources if has_docstring(parse(text))] == []
    assert "argparse" in dict(library_sources)
    assert not any(".test." in f".{name}." for name, _ in library_sources)


def test_the_library_sources_keep_everything_else(library_sources: list[tuple[str, str]]) -> None:
    folder = Path(ast.__file__).parent
    for module in ("argparse", "turtle", "json.decoder"):
        file = folder.joinpath(*module.split(".")).with_suffix(".py")
        original = file.read_text(encoding="utf-8")
        cut = dict(library_sources)[module]
        assert ast.dump(ast.parse(cut)) == without_docstrings(ast.parse(original))
        comments = [line for line in original.split("\n") if line.lstrip().startswith("# ")]
        assert set(comments) <= set(cut.split("\n"))


def test_every_docstring_of_the_library_has_code_that_does_not_hold_it(
    library_docstrings: list[Docstring],
) -> None:
    assert len(library_docstrings) > 5000
    assert len({docstring.package for docstring in library_docstrings}) > 100
    for docstring in library_docstrings:
        assert docstring.text == docstring.text.strip() != ""
        tree = parse(docstring.code)
        assert not has_docstring(tree)
        (definition,) = tree.body
        assert isinstance(definition, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        assert definition.name == docstring.name.rpartition(".")[2]
        assert docstring.name.split(".")[0] == docstring.package
