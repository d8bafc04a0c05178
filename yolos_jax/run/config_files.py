"""Finds installed configs by name, and lists their keys with the comments on them."""

import inspect
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import yolos_jax.configs
from yolos_jax.errors import InputError

FOLDER = Path(yolos_jax.configs.__file__).parent


def names() -> list[str]:
    """The names of the installed configs."""
    return sorted(path.stem for path in FOLDER.glob('*.py') if path.stem not in ('__init__', 'common'))


def names_like(get_config: Callable) -> list[str]:
    """The names of those that have the keys of the config that `get_config` makes."""
    return [name for name in names() if values(read(name)).keys() >= values(get_config()).keys()]


def read(name: str) -> ConfigDict:
    """The config of a file, or an installed one by name; raises as `find`."""
    return runpy.run_path(find(name))['get_config']()


def find(name: str) -> str:
    """The file of a config: one that is there, or an installed one by name.

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_file():
        return name
    installed = FOLDER / f'{Path(name).stem}.py'
    if installed.is_file() and name in (installed.stem, installed.name, f'configs/{installed.name}'):
        return str(installed)
    raise InputError(f'{name}: no such config file, and no installed one: {", ".join(names())}')


def is_pretraining(config: Container[str]) -> bool:
    """Whether a config, or its flat form, is one for pre-training and not for a detector."""
    return 'smoothing' in config


def resolved(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line with the file in place of the config's name; raises as `find`.

    The file can then import others in its folder.
    """
    result, is_name = [], False
    for argument in arguments:
        match = re.fullmatch(r'(--?config=)(.+)', argument)
        if is_name or match:
            flag, name = match.groups() if match else ('', argument)
            file = find(name)
            sys.path.append(os.path.dirname(os.path.abspath(file)))
            argument = flag + file
        is_name = argument in ('--config', '-config')
        result.append(argument)
    return result


def keys(get_config: Callable, config: ConfigDict) -> list[str]:
    """A line for each key that `get_config` comments: its value in `config`, and the comment."""
    by_key, lines = values(get_config()) | values(config), []
    for line in inspect.getsource(get_config).splitlines():
        if (match := re.match(r'\s+c\.([\w.]+) = .+?(?:\s+# (.*))?$', line)) and match[1] in by_key:
            value = str(by_key[match[1]]).replace(' ', '')
            lines.append(f'  --config.{match[1]}={value}'.ljust(45) + f' {match[2] or ""}')
    return lines


def values(config: ConfigDict | dict, parent: str = '') -> dict[str, Any]:
    """The values of a config by their keys, {'key.key': value}; parent: what all keys begin with."""
    result = {}
    for name, value in config.items():
        is_inner = isinstance(value, ConfigDict | dict)
        result |= values(value, f'{parent}{name}.') if is_inner else {parent + name: value}
    return result


def flat(config: ConfigDict) -> dict:
    """The values of a config by their keys, as they come back from a file: lists in place of tuples."""
    return values(json.loads(config.to_json()))
