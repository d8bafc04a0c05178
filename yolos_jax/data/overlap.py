"""What a training and a validation split have in common and should not, or have not and should."""

import collections
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from yolos_jax import cpus, files
from yolos_jax.data.folders import Folder
from yolos_jax.data.records import Records
from yolos_jax.errors import shown

ENDS = 4096  # bytes at either end of a file that tell most files apart


def notes(train: Records, val: Records) -> list[str]:
    """What a reader should know about two splits, a line each."""
    lines = []
    if same := in_both(train, val):
        lines.append(f'{len(same)} images are in both splits: {shown([f"{a} = {b}" for a, b in same])}')
    names = [{r.classes[label].lower() for label in np.unique(r.labels).tolist()} for r in (train, val)]
    if never := sorted(names[1] - names[0]):
        lines.append(f'{len(never)} classes have objects to evaluate but none to train on: {shown(never)}')
    if unseen := sorted(names[0] - names[1]):
        lines.append(
            f'{len(unseen)} classes have objects to train on but none to evaluate: {shown(unseen)}'
        )
    return lines


def in_both(train: Records, val: Records) -> list[tuple[str, str]]:
    """The names of image files with the same bytes in both; not looked for in other forms of storage."""
    if not (isinstance(train.images, Folder) and isinstance(val.images, Folder)):
        return []
    with ThreadPoolExecutor(cpus.usable()) as pool:
        paths = [[r.name(i) for i in range(len(r))] for r in (train, val)]
        paths = [[name for name in names if os.path.isfile(name)] for names in paths]
        for key in (os.path.getsize, _ends, files.sha256):  # each looks only at what the one before left
            keys = [dict(zip(names, pool.map(key, names), strict=True)) for names in paths]
            common = set(keys[0].values()) & set(keys[1].values())
            paths = [[name for name in names if keys[i][name] in common] for i, names in enumerate(paths)]
    trained = collections.defaultdict(list)
    for name in paths[0]:
        trained[keys[0][name]].append(name)
    return [(trained[keys[1][name]][0], name) for name in paths[1]]


def _ends(path: str) -> bytes:
    with open(path, 'rb') as file:
        first = file.read(ENDS)
        file.seek(-min(ENDS, os.path.getsize(path)), os.SEEK_END)
        return hashlib.sha256(first + file.read()).digest()  # of very many files that are equally long
