"""Imports the modules of a package when their names are first used."""

import importlib.util
from collections.abc import Callable
from typing import Any


def modules_of(package: str, names: dict[str, list[str]] | None = None) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562), so that `yolos_jax.tools.speed` needs no import of its own.

    names: {module of the package: its names that the package has too}.
    """
    # not etils' lazy imports: they replace `__import__` for all threads, whose imports then fail
    module_of = {name: module for module, of_module in (names or {}).items() for name in of_module}

    def get(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(f'{package}.{module_of[name]}'), name)
        if importlib.util.find_spec(f'{package}.{name}') is None:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return importlib.import_module(f'{package}.{name}')

    return get
