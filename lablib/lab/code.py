"""lablib's own code, shown from its source."""

import inspect
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display

from lablib.paths import PACKAGE


def source(object: Any, *, docstring: bool = True) -> None:
    """Show the source of a function, class or module of lablib, with its file and line.

    docstring: show it, too. Raises TypeError when the object has no Python source.
    """
    object = inspect.unwrap(object) if callable(object) else object
    text = inspect.cleandoc("\n" + inspect.getsource(object)).strip()
    if not docstring and (found := inspect.getdoc(object)):
        text = _without_docstring(text, found)
    path = Path(inspect.getsourcefile(object)).resolve()
    name = path.relative_to(PACKAGE.parent) if PACKAGE in path.parents else path.name
    where = f"`{name.as_posix() if isinstance(name, Path) else name}`"
    if not inspect.ismodule(object):
        where += f", line {inspect.getsourcelines(object)[1]}"
    display(Markdown(f"{where}\n\n```python\n{text}\n```"))


def _without_docstring(text: str, docstring: str) -> str:
    import ast

    node = ast.parse(text).body[0]
    first = node.body[0]
    lines = text.splitlines()
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :])
