"""The data path: annotations -> records -> geometry -> plan -> loader; per image pixels does the work.

A module is imported when its name is first used.
"""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    try:
        return importlib.import_module(f'{__name__}.{name}')
    except ModuleNotFoundError:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None
