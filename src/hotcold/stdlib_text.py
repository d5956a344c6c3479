"""The English text that every Python carries: its language reference, docstrings and comments.

It makes the demo work with nothing but an installed Python: megabytes of technical prose, free to use, the
same on every machine with the same Python. Source files are parsed, never imported, so nothing is executed.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from inspect import cleandoc
from pathlib import Path

__all__ = ["stdlib_documents"]

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "config",
    "pydoc_data",
}
_MIN_PARAGRAPH = 40  # characters; shorter ones are headings, signatures and "See above."
_MIN_DOCUMENT = 200  # characters
_MIN_PROSE = 0.75  # share of letters and spaces, below which a paragraph is code, a table or a diagram
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Yield (id, text) of each topic (`topic/NAME`) and each module (`module/a.b.c`) of the standard library.

    The order is by a hash of the id: fixed, and a fair sample wherever a reader stops. Repeated paragraphs
    are dropped, so that no text is on both sides of a split by document.
    """
    seen: set[str] = set()
    sources = {**_topics(), **_modules()}
    for name in sorted(sources, key=lambda name: hashlib.md5(name.encode(), usedforsecurity=False).digest()):
        paragraphs = [p for p in _paragraphs(sources[name]()) if _is_prose(p)]
        text = "\n\n".join(_unseen(paragraphs, seen))
        if len(text) >= _MIN_DOCUMENT:
            yield name, text


def _topics() -> dict[str, Callable[[], str]]:
    from pydoc_data.topics import topics  # a module that holds one dictionary of strings

    return {f"topic/{name}": lambda text=text: text for name, text in topics.items()}


def _modules() -> dict[str, Callable[[], str]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    return {
        "module/" + ".".join(path.with_suffix("").parts): lambda path=path: _english(root / path)
        for path in paths
        if not any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in path.parts)
    }


def _english(path: Path) -> str:
    """Docstrings (outermost first), then comment blocks, of a source file; empty if it cannot be parsed."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    comments = (_COMMENT_MARK.sub("", block) for block in _COMMENT_BLOCK.findall(source))
    return "\n\n".join([text for text in docstrings if text] + list(comments))


def _paragraphs(text: str) -> list[str]:
    return [cleandoc(part) for part in re.split(r"\n\s*\n", text.expandtabs())]


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < _MIN_PARAGRAPH or paragraph.startswith((">>>", "...")):
        return False
    plain = sum(char.isascii() and (char.isalpha() or char.isspace()) for char in paragraph)
    return plain >= _MIN_PROSE * len(paragraph)


def _unseen(paragraphs: list[str], seen: set[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        key = " ".join(paragraph.split()).lower()
        if key not in seen:
            seen.add(key)
            yield paragraph
