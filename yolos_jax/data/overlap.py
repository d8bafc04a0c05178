"""Compares a training and a validation split: images in both, and classes in only one of them."""

import collections
import hashlib
import itertools
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from yolos_jax import cpus, files
from yolos_jax.data.folders import Folder
from yolos_jax.data.records import Records
from yolos_jax.errors import shown
from yolos_jax.naming import name_key

ENDS = 4096  # bytes at either end of a file that tell most files apart
PART = 256  # files of one job of a thread


def notes(train: Records, val: Records) -> list[str]:
    """Notes for the user on a pair of splits, a line each."""
    lines = []
    if same := in_both(train, val):
        lines.append(f'{len(same)} images are in both splits: {shown([f"{a} = {b}" for a, b in same])}')
    names = [{name_key(r.classes[label]) for label in np.unique(r.labels).tolist()} for r in (train, val)]
    if never := sorted(names[1] - names[0]):
        lines.append(f'{len(never)} classes have objects to evaluate but none to train on: {shown(never)}')
    if unseen := sorted(names[0] - names[1]):
        lines.append(
            f'{len(unseen)} classes have objects to train on but none to evaluate: {shown(unseen)}'
        )
    return lines


def in_both(train: Records, val: Records) -> list[tuple[str, str]]:
    """Pairs of image files with equal bytes, one of each split; empty unless both are in local folders."""
    if not (isinstance(train.images, Folder) and isinstance(val.images, Folder)):
        return []
    with ThreadPoolExecutor(cpus.usable()) as pool:
        paths = [[r.name(i) for i in range(len(r))] for r in (train, val)]
        for key in (_size, _ends, files.sha256):  # each only for files that share the key before
            keys = [_keys(pool, key, names) for names in paths]
            common = set(keys[0].values()) & set(keys[1].values()) - {None}
            paths = [[name for name in names if keys[i][name] in common] for i, names in enumerate(paths)]
    trained = collections.defaultdict(list)
    for name in paths[0]:
        trained[keys[0][name]].append(name)
    return [(trained[keys[1][name]][0], name) for name in paths[1]]


def _keys(pool: ThreadPoolExecutor, key: Callable[[str], Any], names: list[str]) -> dict[str, Any]:
    """{name: its key}; a job takes many names, since a job for each would cost more than most keys."""
    parts = [names[i : i + PART] for i in range(0, len(names), PART)]
    keys = pool.map(lambda part: [_of_readable(key, name) for name in part], parts)
    return dict(zip(names, itertools.chain.from_iterable(keys), strict=True))


def _of_readable(key: Callable[[str], Any], path: str) -> Any:
    """The key of a file, or None if it cannot be read."""
    try:
        return key(path)
    except OSError:
        return None


def _size(path: str) -> int | None:
    status = os.stat(path)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _ends(path: str) -> bytes:
    with open(path, 'rb') as file:
        first = file.read(ENDS)
        file.seek(-min(ENDS, os.path.getsize(path)), os.SEEK_END)
        return hashlib.sha256(first + file.read()).digest()  # hashed: many files may have one size
