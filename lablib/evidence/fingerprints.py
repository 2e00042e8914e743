"""What a result depends on: the definitions that its code reaches, and the content it opened.

A definition is a function, class or constant at the top of one of lablib's modules. Its hash leaves
out docstrings, annotations and comments, and is the same under Python 3.10 to 3.13. Reached is what
a definition names, and so on; what only draws (`lab`) or judges (`evidence`) is not followed, and
neither are the modules whose outcome is content, which is hashed itself.
"""

import ast
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path

from lablib.files import sha256, write_json
from lablib.paths import PACKAGE, cache_dir

# Verdicts are judged again from values, and figures measure nothing.
NOT_FOLLOWED = ("lab", "evidence", "exercises", "papers", "cli", "lazy", "paths", "files", "bench")
# What these give is files, whose SHA-256 is kept beside the code's hash.
CONTENT = ("data.corpora", "data.packages", "models.weights", "models.gguf_file", "models.e5_file")

Name = tuple[str, str]  # module below lablib, such as "models.gpt", and the definition in it


def code_hash(*roots: str, package: Path = PACKAGE) -> str:
    """16 hexadecimal digits over the definitions that `roots` reach.

    roots: as "studies.switch_transformers:run". Raises KeyError for one that is not defined.
    """
    code = _code(package)
    names = {tuple(root.split(":")) for root in roots}
    for module, name in names:
        if name not in code.module(module).definitions:
            raise KeyError(f"lablib.{module} defines no {name}")
    return code.digest(code.reached(names))


def constants(*roots: str, package: Path = PACKAGE) -> dict[str, str]:
    """The constants of studies that `roots` reach: "glam.TUNED['dense']" -> a hash of its value.

    An entry a key, where a constant is a dictionary. Values are compared as they are written.
    """
    code = _code(package)
    rows: dict[str, str] = {}
    for module, name in sorted(code.reached({tuple(root.split(":")) for root in roots})):
        if module.startswith("studies."):
            for value in code.module(module).values(name):
                rows |= _entries(f"{module.removeprefix('studies.')}.{name}", value)
    return rows


def _entries(name: str, value: ast.expr) -> dict[str, str]:
    if not isinstance(value, ast.Dict) or not all(isinstance(k, ast.Constant) for k in value.keys):
        return {name: short_hash(dump(value))[:8]}
    parts = zip(value.keys, value.values)
    return {
        k: v for key, part in parts for k, v in _entries(f"{name}[{key.value!r}]", part).items()
    }


def notebook_hash(path: Path, package: Path = PACKAGE) -> str:
    """The same for what a notebook's claims are computed from, figures and prose left out."""
    text = path.read_text("utf-8")

    def compute() -> str:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        return _code(package).digest_of_notebook("\n".join(sources))

    return _remembered("notebooks", f"{short_hash(text)} {_state(package)}", compute)


def content_digest(path: Path) -> str:
    """SHA-256 of a file, read again only when its size or time has changed."""
    stat = path.stat()
    key = f"{path} {stat.st_size} {stat.st_mtime_ns}"
    return _remembered("content", key, lambda: sha256(path))


def _remembered(kind: str, key: str, compute: Callable[[], str]) -> str:
    """What `compute` gave for `key`, now or in an earlier process."""
    memo = cache_dir() / "fingerprints" / f"{kind}.json"
    known = _known(memo)
    if key not in known:
        known[key] = compute()
        with contextlib.suppress(OSError):  # a cache that can't be written is no reason to stop
            write_json(memo, dict(list(known.items())[-1000:]))
    return known[key]


@cache
def _known(memo: Path) -> dict[str, str]:
    try:
        return json.loads(memo.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


@cache
def _state(package: Path) -> str:
    """Changes whenever one of the package's files does."""
    stats = ((path, path.stat()) for path in sorted(package.rglob("*.py")))
    return short_hash(" ".join(f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in stats))


@cache
def _code(package: Path) -> "Code":
    return Code(package)


class Code:
    """lablib's modules as definitions that name one another."""

    def __init__(self, package: Path):
        self.package = package
        self.modules: dict[str, Module] = {}

    def module(self, name: str) -> "Module":
        """The module called `name` below lablib; "" is lablib itself."""
        if name not in self.modules:
            self.modules[name] = Module(self, name)
        return self.modules[name]

    def file(self, module: str) -> Path | None:
        """The module's source, or None when there is no such module."""
        path = self.package.joinpath(*module.split("."))
        for found in (path.with_suffix(".py"), path / "__init__.py"):
            if module and found.is_file():
                return found
        return self.package / "__init__.py" if not module else None

    def reached(self, names: Iterable[Name]) -> set[Name]:
        """`names` and all definitions that they reach."""
        done: set[Name] = set()
        waiting = list(names)
        while waiting:
            module, name = waiting.pop()
            if (module, name) not in done:
                done.add((module, name))
                waiting += self.module(module).names(name)
        return done

    def digest(self, names: Iterable[Name]) -> str:
        """A hash of the definitions, whichever modules they lie in."""
        rows = sorted(f"{name}={self.module(module).dump(name)}" for module, name in names)
        return short_hash("\n".join(rows))

    def digest_of_notebook(self, source: str) -> str:
        lines = (line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
        module = Module(self, "<notebook>", "\n".join(lines))
        kept = claim_statements(module.tree.body)
        names = {name for node in kept for name in module.resolved(node)}
        own = "\n".join(dump(node) for node in kept)
        return short_hash(own + self.digest(self.reached(names)))

    def follow(
        self, module: str, parts: list[str], passed: frozenset[Name] = frozenset()
    ) -> Iterator[Name]:
        """The definitions that `parts`, a dotted name in a module of lablib, stand for.

        passed: names that led here; a module may import a name of its own, as a package does that
        imports one of its modules.
        """
        if self.file(module) is None or not _followed(module):
            return
        if not parts:  # the module as such: whatever it defines
            yield from ((module, name) for name in self.module(module).definitions)
            return
        first, rest = parts[0], parts[1:]
        below = f"{module}.{first}".lstrip(".")
        here = self.module(module)
        if first in here.definitions:
            yield module, first
        elif first in here.lazy:
            yield from self.follow(f"{module}.{here.lazy[first]}", parts)
        elif first in here.imports and (module, first) not in passed:
            yield from self.follow_import(here.imports[first], rest, passed | {(module, first)})
        elif self.file(below) is not None:
            yield from self.follow(below, rest)

    def follow_import(
        self, target: Name, rest: list[str], passed: frozenset[Name] = frozenset()
    ) -> Iterator[Name]:
        """What an import gave: a name in a module, or the module itself when the name is empty."""
        module, name = target
        yield from self.follow(module, [name, *rest] if name else rest, passed)


class Module:
    """One module's definitions: name -> statements that make it, registrations included."""

    def __init__(self, code: Code, name: str, source: str | None = None):
        self.code, self.name = code, name
        path = code.file(name) if source is None else None
        self.tree = bare(path.read_text("utf-8") if path else source or "")
        self.imports: dict[str, tuple[str, str]] = {}
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.loose: list[ast.stmt] = []
        for node in _flat(self.tree.body):
            self._take(node)
        for node in self.loose:  # such as register_autograd: part of what it registers with
            for owner in _roots(_registrar(node)):
                if owner in self.definitions:
                    self.definitions[owner].append(node)

    def _take(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self.imports |= self.imported(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            owners = {root for d in node.decorator_list for root in _roots(d)}
            if owners & set(self.definitions):
                self.loose.append(node)
            self.definitions.setdefault(node.name, []).append(node)
        elif names := _targets(node):
            for name in names:
                self.definitions.setdefault(name, []).append(node)
        else:
            self.loose.append(node)

    def imported(self, node: ast.stmt) -> dict[str, tuple[str, str]]:
        """Local name -> (module below lablib, name in it), of one import; others are left out."""
        rows = {}
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "lablib":
                    rows[alias.asname or "lablib"] = (
                        ".".join(parts[1:]) if alias.asname else "",
                        "",
                    )
        elif isinstance(node, ast.ImportFrom):
            base = self._base(node)
            if base is not None:
                for alias in node.names:
                    rows[alias.asname or alias.name] = (base, alias.name)
        return rows

    def _base(self, node: ast.ImportFrom) -> str | None:
        """The module below lablib that names are imported from; None for another package's."""
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            package = self.name.split(".")
            if (self.code.file(self.name) or Path()).name != "__init__.py":
                package = package[:-1]
            return ".".join([*package[: len(package) - node.level + 1], *parts])
        return ".".join(parts[1:]) if parts[:1] == ["lablib"] else None

    @cached_property
    def lazy(self) -> dict[str, str]:
        """Name -> submodule, of a package whose names are imported when they are first used."""
        for node in self.definitions.get("_PLACES", []):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                return ast.literal_eval(value)
        return {}

    @cache  # noqa: B019 - a module lives as long as the process
    def names(self, definition: str) -> set[Name]:
        """What a definition names."""
        nodes = self.definitions.get(definition, [])
        return {name for node in nodes for name in self.resolved(node)}

    def resolved(self, node: ast.stmt) -> Iterator[Name]:
        """The definitions of lablib that a statement names; annotations count for nothing."""
        inner = {}
        for part in ast.walk(node):
            if isinstance(part, (ast.Import, ast.ImportFrom)):
                inner |= self.imported(part)
        for chain in _chains(node):
            if chain[0] in inner:
                yield from self.code.follow_import(inner[chain[0]], chain[1:])
            elif chain[0] in self.definitions:
                yield self.name, chain[0]
            elif chain[0] in self.imports:
                yield from self.code.follow_import(self.imports[chain[0]], chain[1:])

    def values(self, definition: str) -> list[ast.expr]:
        """What is assigned to a constant; nothing for functions and classes."""
        nodes = self.definitions.get(definition, [])
        return [node.value for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign))]

    @cache  # noqa: B019 - a module lives as long as the process
    def dump(self, definition: str) -> str:
        """The definition in a form that is the same in every Python version."""
        return "".join(dump(node) for node in self.definitions.get(definition, []))


def _followed(module: str) -> bool:
    return module.split(".")[0] not in NOT_FOLLOWED and module not in CONTENT


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those under a top-level `if` or `try` included."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            yield from _flat(
                part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)
            )
        else:
            yield node


def _targets(node: ast.stmt) -> list[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return []
    parts = (part for target in targets for part in ast.walk(target))
    return [part.id for part in parts if isinstance(part, ast.Name)]


def _is_docstring(node: ast.AST) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


def _registrar(node: ast.stmt) -> ast.AST:
    """What a loose statement hangs on: a call's function, a definition's decorators."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return node.value.func
    decorators = getattr(node, "decorator_list", [])
    return ast.Tuple(elts=list(decorators), ctx=ast.Load())


def _roots(node: ast.AST) -> set[str]:
    return {chain[0] for chain in _chains(node)}


def _chains(node: ast.AST) -> Iterator[list[str]]:
    """Every dotted name in a tree: a.b.c as ["a", "b", "c"]."""
    parts: list[str] = []
    here = node
    while isinstance(here, ast.Attribute):
        parts.insert(0, here.attr)
        here = here.value
    if isinstance(here, ast.Name):
        yield [here.id, *parts]
        return
    for child in ast.iter_child_nodes(here):
        yield from _chains(child)


class _Bare(ast.NodeTransformer):
    """Without docstrings and annotations."""

    def visit_Module(self, node):
        return self._without_docstring(node)

    visit_ClassDef = visit_Module

    def visit_FunctionDef(self, node):
        node = self._without_docstring(node)
        node.returns = None
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        node = self.generic_visit(node)
        node.annotation = ast.Constant(value=None)
        return node

    def _without_docstring(self, node):
        node = self.generic_visit(node)
        node.body = [part for part in node.body if not _is_docstring(part)]
        return node


def bare(source: str) -> ast.Module:
    """A module's tree without docstrings and annotations."""
    return _Bare().visit(ast.parse(source))


def dump(value: object) -> str:
    """A bare tree as text that is the same under Python 3.10 to 3.13.

    `ast.dump` and `ast.unparse` write one tree differently from version to version.
    """
    if isinstance(value, ast.AST):
        fields = ((name, getattr(value, name, None)) for name in value._fields)
        parts = (f"{name}:{dump(part)}" for name, part in fields if _says(name, part))
        return f"{type(value).__name__}({','.join(parts)})"
    if isinstance(value, list):
        return f"[{','.join(dump(part) for part in value)}]"
    return repr(value)


def _says(name: str, part: object) -> bool:
    # ctx follows from the place; the others came or went between versions.
    return part not in (None, []) and name not in ("ctx", "kind", "type_comment", "type_params")


def claim_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a notebook that its claims' values are computed by, in order.

    From each `lab.claim(id, values)` backward: what assigns a name that is needed, calls a method
    on it or passes it to a function. Calls of what shows things are none of those.
    """
    about = [(_roots(node), _changes(node), _judges(node), _shows(node)) for node in body]
    needed: set[str] = set()
    kept: set[int] = set()
    while True:
        before = len(needed), len(kept)
        for place, (roots, changes, judges, shows) in enumerate(about):
            if judges or (changes & needed and not shows):
                kept.add(place)
                needed |= roots - {"lab"}
        if (len(needed), len(kept)) == before:
            return [body[place] for place in sorted(kept)]


def _judges(node: ast.stmt) -> bool:
    """Whether a statement judges a claim from values that the notebook gives."""
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(
        next(iter(_chains(call.func)), [])[-1:] == ["claim"] and len(call.args) > 1
        for call in calls
    )


def _changes(node: ast.stmt) -> set[str]:
    """Names that a statement defines, assigns to, or may change by calling."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return set()
    if isinstance(node, ast.Expr):
        return _roots(node)
    stored = {p.id for p in ast.walk(node) if isinstance(p, ast.Name) and _stores(p)}
    changed = {root for p in ast.walk(node) if isinstance(p, ast.Call) for root in _roots(p.func)}
    loops = isinstance(node, (ast.For, ast.While, ast.With, ast.If, ast.Try))
    return stored | (changed if loops else set()) | set(_targets(node))


def _stores(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Store)


SHOWING = {"lab", "figures", "show", "explore", "source", "check", "print", "display", "fig"}


def _shows(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    return bool(_roots(node.value.func) & SHOWING)


def short_hash(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
