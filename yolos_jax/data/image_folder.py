"""Finds the folder that the images of an annotation file are in, even if it was moved or renamed."""

import collections
import functools
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from yolos_jax.data.folders import BucketFolder, Folder
from yolos_jax.errors import InputError


def locate(
    files: np.ndarray, places: Sequence[Folder | BucketFolder], annotation_file: Path, argument: str
) -> tuple[Folder | BucketFolder, np.ndarray]:
    """The folder that images are in, and their names there.

    Each folder is tried with the names as they are, without one or more of the parent folders that all
    names share, and without any folders. The combination with the most of the first hundred files is taken.

    Raises:
        InputError: no folder fits, or several images would map to one file.
    """
    names = files.tolist()
    try:
        common = os.path.commonpath({os.path.dirname(name) for name in names})
    except ValueError:  # absolute and relative names mixed
        common = ''
    shared = [*reversed(PurePosixPath(common).parents), common or '.']
    forms = [
        lambda name: name,
        *(functools.partial(os.path.relpath, start=x) for x in shared),
        os.path.basename,
    ]
    sample = names[:100]
    tries = [(place, form) for place in places for form in forms]
    is_inside = lambda name: not name.startswith('/') and '..' not in name.split('/')
    count_in = lambda place, form: sum(is_inside(form(name)) and place.has(form(name)) for name in sample)
    place, form = next((t for t in tries if count_in(*t) == len(sample)), None) or max(
        tries, key=lambda t: count_in(*t)
    )
    if not count_in(place, form):
        raise InputError(
            f'{annotation_file}: the images it names ({sample[0][:80]}, ...) are not in {places[0]}, nor '
            'where else exports put them',
            argument,
        )
    located = [form(name) for name in names]
    if outside := [name for name in located if not is_inside(name)]:
        raise InputError(
            f'{annotation_file}: names files outside the folder {place}: {outside[0]}', argument
        )
    if len(set(located)) < len(set(names)):  # cam1/1.jpg and cam2/1.jpg
        twice, _ = collections.Counter(dict(zip(names, located, strict=True)).values()).most_common(1)[0]
        raise InputError(f'{annotation_file}: names several images that would be {place}/{twice}', argument)
    return place, np.array(located, str)
