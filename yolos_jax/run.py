"""A run's folder: one run at a time, always with the same config, stopped without losing a step."""

import contextlib
import fcntl
import json
import os
import signal
import socket
from pathlib import Path

from jax.experimental import multihost_utils

from yolos_jax import cluster
from yolos_jax.errors import InputError

# what may differ when a run is resumed: it changes what is written, not what is computed
FREE = {
    'data',
    'init_from',
    'log_every',
    'save_every',
    'eval_every',
    'model.remat',
    'shard_params',
    'accumulate_steps',
}


LOCK = '.lock'  # in a run's folder: who uses it


@contextlib.contextmanager
def folder(path):
    """The run's folder, made and locked; the lock ends with the process, however that ends.

    Of several processes the first does this for all.

    Raises:
        InputError: it cannot be written to, or another run is using it.
    """
    path = Path(path)
    if not cluster.is_first():
        yield path
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / LOCK, 'a+')
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
    """Whether the run was asked to end (SIGTERM; alone also Ctrl-C); a second request ends it at once.

    Of several processes any may be asked, and all stop after the same step: JAX takes the signal then.
    """

    def __init__(self):
        self._asked = False
        if cluster.is_alone():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number, _):
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def after(self, step):
        """Whether to stop after this step; every process asks at every step."""
        return self._asked if cluster.is_alone() else multihost_utils.reached_preemption_sync_point(step)
