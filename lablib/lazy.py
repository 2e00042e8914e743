"""Names that are imported when they are first used, so that importing a package costs nothing."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, places: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`package`'s module-level `__getattr__` and `__dir__` (PEP 562), for completion by Tab.

    places: name -> the submodule that has it.
    """

    def get(name: str) -> Any:
        if name in places:
            return getattr(import_module(f"{package}.{places[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        found = vars(sys.modules[package])
        return sorted({*found, *found.get("__all__", ()), *places})

    return get, names
