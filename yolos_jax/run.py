"""A run's folder: one run at a time, always with the same config, stopped without losing a step."""

import contextlib
import fcntl
import json
import os
import signal
import socket
from pathlib import Path

from yolos_jax.errors import InputError

# what may differ when a run is resumed: it changes what is written, not what is computed
FREE = {'data', 'init_from', 'log_every', 'save_every', 'eval_every', 'model.remat'}


@contextlib.contextmanager
def folder(path):
    """The run's folder, made and locked; the lock ends with the process, however that ends.

    Raises:
        InputError: it cannot be written to, or another run is using it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / '.lock', 'a+')
    except OSError as error:
        raise InputError(f'{path}: cannot write to it ({error.strerror})') from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(f'{path}: in use by another run ({lock.read().strip()})') from None
        lock.truncate(0)
        lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        lock.flush()
        yield path


def flat(config):
    """A config as {'key.key': plain value}, as it comes back from a file."""
    result = {}
    for key, value in json.loads(config.to_json()).items():
        nested = value if isinstance(value, dict) else {'': value}
        result |= {f'{key}.{inner}'.rstrip('.'): x for inner, x in nested.items()}
    return result


def check_same(saved, current, workdir):
    """Raises InputError where a resumed run's config is not the saved one, both as `flat` makes them."""
    differ = [
        f'{key}: {saved.get(key)!r} then, {current.get(key)!r} now'
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and key not in FREE
    ]
    if differ:
        raise InputError(
            f'{workdir}: holds a run with another config ({"; ".join(differ)}); use another workdir, or '
            'the same values'
        )


class StopSignal:
    """True once the process was asked to end (SIGTERM, Ctrl-C); a second request ends it at once."""

    def __init__(self):
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, _):
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self):
        return self._asked
