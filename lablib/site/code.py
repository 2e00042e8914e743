"""lablib's code as pages of the site, with a line for each link to arrive at.

The exercises' references are left out: a course should not have its solutions a search away.
"""

import ast
import functools
import html
import re
from pathlib import Path

from lablib.paths import PACKAGE

LEFT_OUT = ("exercises", "_data")
# An import as Pygments writes it: the module, and the names up to the end of the statement.
IMPORT = re.compile(
    r'(<span class="kn">from</span><span class="w"> </span><span class="nn">)(lablib[\w.]*)'
    r'(</span><span class="w"> </span><span class="kn">import</span>)'
    r'((?: <span class="p">\(</span>.*?<span class="p">\)</span>)|[^\n]*)',
    re.DOTALL,
)


@functools.cache
def modules() -> dict[str, Path]:
    """Name -> file of every module that has a page."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in LEFT_OUT:
            name = ".".join(("lablib", *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def module_of(file: str) -> str | None:
    """The module in a file such as "lablib/experts/moe.py"; None when it has no page."""
    name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return name if name in modules() else None


def page(module: str) -> str:
    """The page of a module, without its ending."""
    return f"code/{module.replace('.', '/')}" + ("/index" if module == "lablib" else "")


@functools.cache
def text_of(module: str) -> str:
    """A module's source."""
    return modules()[module].read_text("utf-8")


def line_of_text(module: str, text: str, near: int) -> int:
    """Where the first line of `text` stands in a module, nearest to line `near`."""
    wanted = text.split("\n")[0].strip()
    lines = text_of(module).splitlines()
    places = [n for n, line in enumerate(lines, start=1) if line.strip() == wanted]
    return min(places, key=lambda n: abs(n - near), default=min(near, len(lines)))


@functools.cache
def target(module: str, name: str) -> tuple[str, int] | None:
    """(module, line) of what `from module import name` gives; None when it has no page.

    Followed are definitions, submodules, and what a package takes from its own modules.
    """
    if f"{module}.{name}" in modules():
        return f"{module}.{name}", 1
    if module not in modules():
        return None
    for node in ast.parse(text_of(module)).body:
        if name in _defined(node):
            return module, node.lineno
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            given = {alias.asname or alias.name: alias.name for alias in node.names}
            if name in given and node.module.startswith("lablib"):
                return target(node.module, given[name])
        if "_PLACES" in _defined(node) and name in (places := ast.literal_eval(node.value)):
            return target(f"{module}.{places[name]}", name)
    return None


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def link_imports(page_html: str, up: str) -> str:
    """The highlighted HTML of a page, with lablib's modules and names in imports as links."""

    def statement(match: re.Match) -> str:
        head, module, middle, names = match.groups()
        there = _link(module, (module, 1) if module in modules() else None, up)
        linked = re.sub(
            r'(?<!as</span> )(<span class="n">)(\w+)(</span>)',
            lambda n: n[1] + _link(n[2], target(module, n[2]), up) + n[3],
            names,
        )
        return head + there + middle + linked

    return IMPORT.sub(statement, page_html)


def _link(words: str, to: tuple[str, int] | None, up: str) -> str:
    if to is None:
        return words
    href = html.escape(f"{up}{page(to[0])}.html#L-{to[1]}")
    return f'<a class="lab-code" href="{href}">{words}</a>'
