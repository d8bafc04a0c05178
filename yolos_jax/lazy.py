"""Imports the modules of a package when their names are first used."""

import importlib.util
from collections.abc import Callable
from types import ModuleType


def modules_of(package: str) -> Callable[[str], ModuleType]:
    """A package's `__getattr__` (PEP 562), so that `yolos_jax.tools.speed` needs no import of its own."""

    def get(name: str) -> ModuleType:
        if importlib.util.find_spec(f'{package}.{name}') is None:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        return importlib.import_module(f'{package}.{name}')

    return get
