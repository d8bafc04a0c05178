"""How every script starts and ends: imports, error lines that name a flag, and memory settings."""

import argparse
import contextlib
import ctypes
import errno
import functools
import gc
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from yolos_jax.errors import InputError
from yolos_jax.run import config_files

TRACEBACK = '--traceback'
FULL = errno.ENOSPC, errno.EDQUOT  # of a disk, or of a user's share of it
PLACE_IN_CONFIG = r'File "(?!.*/ml_collections/)(.+)", line (\d+)'  # in a traceback of its loader


def start(name: str) -> None:
    """Run the command in a module of `yolos_jax.tools`.

    While it is imported, which takes seconds, Ctrl-C ends the process at once: a KeyboardInterrupt that
    falls into JAX's callback of the garbage collection would be lost, and the command would go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    open_streams()
    # bash does not expand the ~ in --workdir=~/runs, and a folder named ~ would be made
    home = lambda argument: re.sub('(?<==)~(?=/|$)', os.path.expanduser('~'), argument, count=1)
    sys.argv[1:] = map(home, sys.argv[1:])
    module = imported(name)
    if name in ('train', 'pretrain'):  # they handle signals themselves (`stop.StopSignal`)
        run_with_flags(module.main, module.KEYS)
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(module.main)


def open_streams() -> None:
    """Open stdin, stdout and stderr, where the caller closed them, as empty files that keep nothing.

    Else Python has none to print to, and the next files that are opened get their numbers: what libraries
    print would be in these files.
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, 'w' if number else 'r', closefd=False))  # noqa: SIM115  kept


def imported(name: str) -> ModuleType:
    """Import a module of `yolos_jax.tools`, whose objects the garbage collector then ignores.

    Scanning them took a tenth of the CPU time up to a run's first step.
    """
    gc.disable()
    module = importlib.import_module(f'yolos_jax.tools.{name}')
    gc.freeze()
    gc.enable()
    return module


def run(main: Callable[[], None], flag: Callable[[str], str] = '--{}'.format) -> None:
    """Call `main()`; an error becomes one line, the last on stderr, and an exit status.

    The status is 1, or 3 if a run diverged (`errors.DivergedError`), or 130 after Ctrl-C. --traceback
    also prints the traceback of the error.
    flag: how this script spells the flag of an argument that an error names.
    """
    open_streams()
    output = _Output()
    shows = TRACEBACK in sys.argv
    if not shows:  # Orbax and TensorStore also print their errors, from each of their threads
        absl_logging.set_verbosity(absl_logging.FATAL)
        sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    sys.argv[:] = [argument for argument in sys.argv if argument != TRACEBACK]
    try:
        main()
        output.check()
    except KeyboardInterrupt as error:
        leave(130, error=error)
    except Exception as error:
        status = error.exit_status if isinstance(error, InputError) else 1
        shown = traceback.format_exc() if shows else ''
        leave(status, f'{shown}error: {_line(error, flag)}', error)


class _Output(io.RawIOBase):
    """Replaces stdout, so that an error in writing to it is reported at the end and no work is lost.

    Stdout may be a closed pipe, a file on a full disk, or ASCII although a class name is not.
    """

    def __init__(self) -> None:
        self._before, self._error = sys.stdout, None  # kept, since a freed one closes its file
        buffer = getattr(sys.stdout, 'buffer', None)
        self._file = getattr(buffer, 'raw', buffer)
        if self._file:
            by_line = sys.stdout.line_buffering or sys.stdout.write_through  # by PYTHONUNBUFFERED
            options = dict(errors='backslashreplace', line_buffering=by_line)
            sys.stdout.flush()
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(self), sys.stdout.encoding, **options)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, data: bytes) -> int:
        """Write, or keep the error."""
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            return len(data)

    def check(self) -> None:
        """Raises InputError if something could not be written, except to a pipe that its reader closed."""
        if self._file:
            sys.stdout.flush()
        if self._error and not isinstance(self._error, BrokenPipeError):
            raise InputError(f'stdout: {self._error.strerror}; everything else is done')


def _line(error: Exception, flag: Callable[[str], str]) -> str:
    """An error in one line."""
    if isinstance(error, InputError):
        return f'{error} ({flag(error.argument)})' if error.argument else str(error)
    text = ' '.join(str(error).split())[:500]
    if 'RESOURCE_EXHAUSTED' in text:
        return f"out of the device's memory; docs/training.md, Troubleshooting, has advice ({text})"
    if isinstance(error, OSError) and error.errno in FULL and not error.filename:  # as Numba raises it
        return f"{error.strerror}, perhaps for Numba's compiled code: set NUMBA_CACHE_DIR to another folder"
    return f'{type(error).__name__}: {text} ({TRACEBACK} shows where)'


def leave(status: int, text: str = '', error: BaseException | None = None) -> NoReturn:
    """End the process now, with the text as the last one on stderr.

    A usual exit would wait for threads that are still compiling, and let libraries print after it. In a
    cluster it would wait for the others, who wait for this process.
    """
    cluster = sys.modules.get('yolos_jax.run.cluster')
    if cluster and not cluster.is_alone():
        if text:
            cluster.leave(status, text, error)
        if not error:  # all processes leave together
            sys.exit(status)
    with contextlib.suppress(OSError):  # a terminal or pipe that was closed, a full disk
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.write(f'{text}\n' if text else '')
        sys.stderr.flush()
    os._exit(status)


def run_with_flags(main: Callable[[], None], keys: Callable) -> None:
    """As `run`, for a script with absl flags; a misspelt config key is an error that names the nearest.

    keys: the function that makes the config with all keys.
    """
    try:
        # absl knows no --traceback; `run` does
        arguments = config_files.resolved([a for a in sys.argv if a != TRACEBACK])
        if {'-h', '--help'} & set(sys.argv[1:]):
            print(_help(main, keys))
            return
        parse = functools.partial(_parse, keys=config_files.values(keys()))
        app.run(lambda _: run(main, flag=_flag_of), argv=arguments, flags_parser=parse)
    except InputError as error:
        sys.exit(f'error: {error} (--config)')
    except Exception as error:  # of the config's file; `run` shows those of main
        if TRACEBACK in sys.argv:
            raise
        sys.exit(f'error: --config: {_line(error, str)}')


def _flag_of(argument: str) -> str:
    """How the flag of an argument is spelt: of the script itself, or else a key of the config."""
    return f'--{argument}' if argument in flags.FLAGS else f'--config.{argument}'


def _parse(arguments: list[str], keys: dict[str, Any]) -> list[str]:
    """Parse absl's flags; an error becomes one line. keys: of a config, with their values."""
    given = [argument.partition('=')[0].lstrip('-') for argument in arguments]
    for key, value in keys.items():
        if isinstance(value, tuple) and given.count(f'config.{key}') > 1:  # would be added up
            sys.exit(f'error: --config.{key} is given twice')
    try:
        rest = flags.FLAGS(arguments)
        if rest[1:]:
            sys.exit(f'error: {rest[1]} is not a flag; flags begin with --')
        return rest
    except AttributeError as error:  # ml_collections' for a key, with the nearest if there is one
        text = re.sub(r"\\?'|^\"|\"$", '', str(error)).replace('\\n', '. ').replace('.  ', '. ')
        if re.fullmatch(r'\w+(\. Did you mean .*)?', text):
            advice = '' if 'Did you mean' in text else '; --help after --config=NAME lists them'
            sys.exit(f'error: --config has no key {text}{advice}')
        sys.exit(f'error: {text.split(" Other fields present")[0]} (--config)')  # of the config's file
    except flags.UnrecognizedFlagError as error:
        meant = [f'--config.{key}' for key in keys if key.rpartition('.')[2] == error.flagname]
        reason = f'--{error.flagname} is not a flag; did you mean {" or ".join(meant)}?' if meant else error
        sys.exit(f'error: {reason}')
    except flags.Error as error:
        if places := re.findall(PLACE_IN_CONFIG, str(error)):
            sys.exit(f'error: {":".join(places[-1])}: {str(error).strip().splitlines()[-1]} (--config)')
        text = '; '.join(line.strip() for line in str(error).splitlines())
        missing = re.findall(r'flag --(\w+)=None: Flag --\w+ must have a value', text)
        sys.exit(f'error: --{" and --".join(missing)} must be given' if missing else f'error: {text}')


def _help(main: Callable, keys: Callable) -> str:
    """The script's docstring, its flags, and the keys and values of the named config, if there is one."""
    module = flags.FLAGS.find_module_defining_flag('config')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--config')
    name = parser.parse_known_args()[0].config
    return '\n'.join(
        [
            sys.modules[main.__module__].__doc__ or '',  # python -OO has none
            flags.FLAGS.module_help(module),
            f'Configs by name: {", ".join(config_files.names_like(keys))}',
            f'Keys of {name}, and their values:'
            if name
            else 'Keys of a config, and the values they have by default:',
            *config_files.keys(keys, config_files.read(name) if name else keys()),
        ]
    )


@contextlib.contextmanager
def without_flags(*names: str) -> Iterator[None]:
    """A decorator for a command without flags of these names: errors about these arguments name none."""
    try:
        yield
    except InputError as error:
        if error.argument in names:
            raise type(error)(str(error)) from None
        raise


def keep_memory() -> None:
    """Let glibc keep freed memory: otherwise steps on a CPU return it to the system and clear it again.

    Training the quickstart on two cores is 1.4 times as fast for it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 28)
