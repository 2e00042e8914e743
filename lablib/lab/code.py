"""lablib's own code, shown from its source."""

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display

from lablib.paths import PACKAGE


def source(object: Any, *, docstring: bool = True) -> None:
    """Show the source of a function, property, class or module of lablib, with its file and line.

    docstring: show it, too. Raises TypeError when the object has no Python source.
    """
    object = _written(object)
    try:
        lines, first = inspect.getsourcelines(object)
        path = Path(inspect.getsourcefile(object)).resolve()
    except (OSError, TypeError):
        raise TypeError(f"{object!r} has no Python source to show") from None
    text = _flush_left(lines)
    text = text if docstring else _without_docstring(text)
    name = path.relative_to(PACKAGE.parent).as_posix() if PACKAGE in path.parents else path.name
    where = f"`{name}`" + ("" if inspect.ismodule(object) else f", line {first}")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    display(Markdown(f"{where}\n\n{fence}python\n{text}\n{fence}"))


def _written(object: Any) -> Any:
    """What stands in the source: the function behind properties, partials and decorators."""
    if isinstance(object, property):
        object = object.fget
    if isinstance(object, functools.cached_property | functools.partial):
        object = object.func
    return inspect.unwrap(object) if callable(object) else object


def _flush_left(lines: list[str]) -> str:
    """The lines without the first one's margin; lines of a string with less keep what they have."""
    margin = re.match(" *", lines[0]).group() if lines else ""
    return "".join(line.removeprefix(margin) for line in lines).strip("\n")


def _without_docstring(text: str) -> str:
    """The text without its own docstring; one that has nothing else keeps it."""
    tree = ast.parse(text)
    defined = tree.body and isinstance(
        tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    )
    node = tree.body[0] if defined and len(tree.body) == 1 else tree
    if ast.get_docstring(node, clean=False) is None or len(node.body) == 1:
        return text
    first, lines = node.body[0], text.splitlines()
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :]).strip("\n")
