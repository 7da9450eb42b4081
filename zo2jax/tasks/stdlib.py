"""Text that every Python installation carries: the docstrings of its standard library, and its code without them."""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LEFT_OUT = {
    "test",
    "tests",
    "encodings",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "config",
}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _modules() -> Iterator[ast.Module]:
    """The standard library's modules, parsed, in the order of their paths; tests and examples are left out.

    Raises:
        FileNotFoundError: if the installation carries no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in root.rglob("*.py") if not _LEFT_OUT.intersection(f.relative_to(root).parts)]
    if not files:
        raise FileNotFoundError(f"no Python sources in {root}: this installation carries no standard library text")
    for file in sorted(files, key=lambda f: f.relative_to(root).as_posix()):
        try:
            yield ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # a template, or a file of another encoding


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, each as one line; doctests and indented blocks (code, tables) are left out."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if lines and ">>>" not in paragraph and not any(line.startswith((" ", "\t")) for line in lines):
            yield " ".join(line.strip() for line in lines)


@cache
def docstrings() -> str:
    """The prose of all docstrings, a paragraph a line.

    >>> len(docstrings()) > 500_000 and ">>>" not in docstrings()
    True
    """
    texts = (
        ast.get_docstring(node, clean=False)
        for module in _modules()
        for node in ast.walk(module)
        if isinstance(node, _DOCUMENTED)
    )
    return "\n".join(dict.fromkeys(paragraph for text in texts if text for paragraph in _prose(text)))


def _without_docstrings(module: ast.Module) -> ast.Module:
    for node in ast.walk(module):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return module


@cache
def source_code(characters: int) -> str:
    """The first ``characters`` of the library's code, without docstrings and comments, in uniform layout.

    >>> "# " in source_code(20_000)
    False
    """
    pieces: list[str] = []
    size = 0
    for module in _modules():
        pieces.append(ast.unparse(_without_docstrings(module)))
        size += len(pieces[-1]) + 2
        if size >= characters:
            break
    return "\n\n".join(pieces)[:characters]
