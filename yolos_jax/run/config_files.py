"""The installed configs: found by name, and their keys with what the comments say of them."""

import ast
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yolos_jax.configs
from yolos_jax.errors import InputError

FOLDER = Path(yolos_jax.configs.__file__).parent


def names() -> list[str]:
    """The names of the installed configs."""
    return sorted(path.stem for path in FOLDER.glob('*.py') if path.stem not in ('__init__', 'common'))


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


def resolved(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line with the file in place of the config's name; raises as `find`."""
    result, is_name = [], False
    for argument in arguments:
        if is_name:
            argument = find(argument)
        elif match := re.fullmatch(r'(--?config=)(.+)', argument):
            argument = match[1] + find(match[2])
        is_name = argument in ('--config', '-config')
        result.append(argument)
    return result


def keys(get_config: Callable) -> list[str]:
    """A line for each key of the config that a function makes: its value, and the comment beside it."""
    lines = []
    for line in inspect.getsource(get_config).splitlines():
        if match := re.match(r'\s+c\.([\w.]+) = (.+?)(?:\s+# (.*))?$', line):
            key, value, comment = match.groups()
            if 'ConfigDict()' not in value:
                shown = 'None' if 'placeholder' in value else value
                lines.append(f'  --config.{key}={_plain(shown)}'.ljust(46) + (comment or ''))
    return lines


def _plain(value: str) -> str:
    try:
        return str(ast.literal_eval(value)).replace(' ', '')
    except ValueError:
        return value
