"""A run's folder: one run at a time, always with the same config."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from yolos_jax.errors import InputError
from yolos_jax.run import cluster

# what may differ when a run resumes: it changes what is written, not what is computed
FREE = {
    'bad_images',
    'data',
    'data_cache',
    'init_from',
    'train_json',
    'train_images',
    'val_json',
    'val_images',
    'log_every',
    'patience',
    'save_every',
    'eval_every',
    'spike_factor',
    'model.remat',
    'shard_params',
    'accumulate_steps',
}
LOCK = '.lock'  # who uses the folder


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[Path]:
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
        lock = open(path / LOCK, 'a+')  # noqa: SIM115  closed below
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


def owner(path: Path) -> str | None:
    """Who has locked a run's folder, where it is locked."""
    return (path / LOCK).read_text() if (path / LOCK).exists() else None


def flat(config: ConfigDict) -> dict:
    """A config as {'key.key': plain value}, as it comes back from a file."""
    result = {}
    for key, value in json.loads(config.to_json()).items():
        nested = value if isinstance(value, dict) else {'': value}
        result |= {f'{key}.{inner}'.rstrip('.'): x for inner, x in nested.items()}
    return result


def check_same_data(saved: dict, current: dict, workdir: Path) -> None:
    """Raises InputError where a resumed run's data are not those it was trained on.

    saved, current: {split: `Records.digests()`}; where the data lie does not matter.
    """
    differ = [
        f'{name} of {split}'
        for split, digests in current.items()
        for name, digest in digests.items()
        if saved.get(split, {}).get(name, digest) != digest
    ]
    if differ:
        raise InputError(
            f'{workdir}: holds a run on other data ({", ".join(differ)} differ); use another workdir, or '
            'the same data'
        )


def check_same(saved: dict, current: dict, workdir: Path) -> list[str]:
    """Compare a resumed run's config with the saved one, both as `flat` makes them.

    More epochs than before are the one change of what is computed that is taken.

    Returns:
        Lines for the reader about that.

    Raises:
        InputError: they differ.
    """
    differ = [
        f'{key}: {saved.get(key)!r} then, {current.get(key)!r} now'
        for key in sorted(saved.keys() | current.keys())
        if key not in FREE and saved.get(key) != current.get(key)
        # what the version that saved did not have was off
        if key in saved or current[key]
        if key != 'epochs' or current[key] < saved[key]
    ]
    if differ:
        raise InputError(
            f'{workdir}: holds a run with another config ({"; ".join(differ)}); use another workdir, or '
            'the same values'
        )
    before, now = saved['epochs'], current['epochs']
    return (
        [f'{now} epochs instead of {before}: from here on the learning rate is that of {now} epochs']
        if now > before
        else []
    )
