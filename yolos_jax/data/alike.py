"""Finds near duplicates by the names of images: copies, augmented versions, and frames of a video."""

import collections
import re
from pathlib import PurePath

import numpy as np

ROBOFLOW = re.compile(r'(_(jpe?g|png|bmp|webp))?\.rf\.\w+$')  # ends the names of Roboflow's versions
VERSION = re.compile(  # ends the names of other copies of an image
    r'[ _-]+(copy|aug|flip|rot)[ _-]*\d*$| ?\(\d+\)$', re.I
)
MOST_VERSIONS = 20  # of a photograph


def groups(files: list[str], labels: np.ndarray, first: np.ndarray, fraction: float) -> list[str]:
    """The group of near duplicates that each image belongs to, as a text; many images are alone in theirs.

    labels, first: of the objects, as in `records.Records`. fraction: the share of the images that
    the second part is to have; runs of frames longer than half of it are divided.
    """
    names = _photographs([str(PurePath(file).with_suffix('')) for file in files], fraction)
    return _runs(names, labels, first, most=max(int(len(set(names)) * fraction / 2), 1))


def _photographs(names: list[str], fraction: float) -> list[str]:
    """The name of the photograph that each image is a version of, or its own name.

    Many images with similar names are not versions of one, but a series: "photo (1)" to "photo (200)".
    """

    def original(name: str) -> str:
        shorter = VERSION.sub('', name)
        return name if shorter == name else original(shorter)

    names = [ROBOFLOW.sub('', name) for name in names]  # these are certainly versions
    counts = collections.Counter(map(original, set(names)))
    most = min(max(len(set(names)) * fraction, 4), MOST_VERSIONS)
    return [original(name) if counts[original(name)] <= most else name for name in names]


def _runs(names: list[str], labels: np.ndarray, first: np.ndarray, most: int) -> list[str]:
    """The run of frames that each image belongs to if its name is in a numbered series, else its name.

    A run is a whole series, or `most` consecutive frames of it. If there is only one series (a camera's),
    or if some class occurs in one series alone (cat_001.jpg), the images of that series are not frames.
    """
    series = [re.sub(r'[\W_]*\d+$', '', name) for name in names]
    frames, having = collections.defaultdict(set), collections.defaultdict(set)
    for one, name in zip(series, names, strict=True):
        frames[one].add(name)
    if len(frames) == 1:
        return names
    image_of = np.repeat(np.arange(len(names)), np.diff(first))
    for label, image in zip(labels.tolist(), image_of.tolist(), strict=True):
        having[label].add(series[image])
    of_one_class = set().union(*(owners for owners in having.values() if len(owners) == 1))
    number = lambda name: (int(re.search(r'\d*$', name)[0] or 0), name)
    runs = {}
    for one, members in frames.items():
        for place, name in enumerate(sorted(members, key=number)):
            runs[name] = one if len(members) <= most else f'{one} {place // most}'
    return [name if one in of_one_class else runs[name] for one, name in zip(series, names, strict=True)]
