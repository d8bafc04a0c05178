"""The images of a split and their objects, as flat arrays: what everything else starts from."""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from yolos_jax import files
from yolos_jax.data import annotations, tfds
from yolos_jax.errors import InputError

INDEX = 1  # the version of the index files


@dataclasses.dataclass(frozen=True)
class Records:
    """n images, sorted by id, and their m objects.

    ids int64 [n]; files str [n]; heights, widths int32 [n]; rows int64 [n], where each image stands in
    the annotation file or data set; boxes float32 [m, 4] xyxy in pixels, inside the image and with an
    area; labels int32 [m] raw category ids; first int64 [n + 1]: image i has the objects first[i] up to
    first[i + 1]; classes: {category id: name}; dropped: {reason: count} of annotations that are no
    targets; json: the annotation file for evaluation; images: a `Folder` or `tfds.Images`.
    """

    ids: np.ndarray
    files: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    rows: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    classes: dict
    dropped: dict
    json: Path
    images: object

    def __len__(self):
        return len(self.ids)

    def objects(self, i):
        """Boxes [k, 4] and labels [k] of image i."""
        span = slice(self.first[i], self.first[i + 1])
        return self.boxes[span], self.labels[span]

    def name(self, i):
        """How to name image i to a reader."""
        return self.images.name(self.files[i])

    def read(self, i):
        """The encoded bytes of image i; raises InputError where they cannot be read."""
        return self.images.read(self.files[i], self.rows[i])

    def digest(self):
        """A text that is the same for the same data, in whichever form it is stored."""
        digest = hashlib.sha256(json.dumps([*self.classes.items()]).encode())
        for values in (
            self.ids,
            self.files,
            self.heights,
            self.widths,
            self.boxes,
            self.labels,
            self.first,
        ):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()

    @property
    def num_classes(self):
        """Size of the class head without "no object": raw ids index it, as in DETR."""
        return max(self.classes) + 1


@dataclasses.dataclass(frozen=True)
class Folder:
    """The image files of a COCO folder's split."""

    path: Path

    def name(self, file):
        """The path of a file."""
        return str(self.path / file)

    def read(self, file, row):
        """The bytes of a file."""
        try:
            with open(os.path.join(self.path, file), 'rb', buffering=0) as stream:
                return stream.read()
        except OSError as error:
            raise InputError(f'{self.path / file}: {error.strerror}') from None

    def missing(self, names):
        """Those of the files named that are not there; folders are listed, files not opened."""
        present = np.fromiter(map(hash, self._walk()), np.int64)  # a tenth of the memory of the names
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        present.sort()
        lacking = np.searchsorted(present, wanted) == np.searchsorted(present, wanted, 'right')
        return [str(name) for name in names[lacking] if not (self.path / name).exists()]

    def _walk(self, inside=''):
        with os.scandir(self.path / inside) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._walk(f'{inside}{entry.name}/')
                else:
                    yield inside + entry.name


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a split comes from.

    images: a `Folder` or `tfds.Images`; load: reads its `annotations.Annotations`; stamped: the file that
    changes with them; json: the annotation file for evaluation.
    """

    images: object
    load: Callable
    stamped: Path
    json: Path

    @classmethod
    def find(cls, root, split):
        """The source of a split of `root`; raises InputError where a file or folder is missing."""
        root = Path(root)
        json = root / 'annotations' / f'instances_{split}.json'
        if tfds.is_dataset(root):
            return cls(tfds.Images(root, split), lambda: tfds.read(root, split), tfds.info_file(root), json)
        for place, kind in (
            (root, 'data folder'),
            (json, 'annotation file'),
            (root / split, 'image folder'),
        ):
            if not place.exists():
                raise InputError(f'{place}: no such {kind} (a COCO folder has annotations/ and {split}/)')
        return cls(Folder(root / split), lambda: annotations.read(json), json, json)


def read(root, split, index=None):
    """The records of a split of `root`, a COCO folder or a data set of tensorflow-datasets.

    A COCO folder has annotations/instances_`split`.json and the images in `split`/; for the other see
    `tfds`. Crowd boxes are no targets; boxes are clamped to the image, and those without an area dropped
    (ConvertCocoPolysToMask of the reference). Images without objects stay.

    index: a folder to keep the arrays in, so that a later start need not read the annotations again.
    They are made anew when the size of the annotation file or its content changes.

    Raises:
        InputError: a file or folder is missing or empty, the JSON is not COCO's, an id stands twice or
            is unknown, a box is not finite, or an image file named in the JSON is not there.
    """
    source = Source.find(root, split)
    kept = index and Path(index) / f'{split}.npz'
    found = index and _read_index(kept, source.stamped)
    if not found:
        found = flatten(source.load())
        if index:
            _write_index(kept, source.stamped, found)
    if missing := source.images.missing(found['files']):
        raise InputError(
            f'{source.images.path}: {len(missing)} of {len(found["ids"])} images of {source.json.name} '
            f'are not there, the first is {missing[0]}'
        )
    return Records(**found, json=source.json, images=source.images)


def flatten(a):
    """The arrays of `Records` from `annotations.Annotations`; raises InputError as `annotations.check`."""
    annotations.check(a)
    order = np.argsort(a.ids)
    ids, heights, widths = a.ids[order], a.heights[order], a.widths[order]
    image = np.searchsorted(ids, a.owners)
    size = np.stack([widths[image], heights[image]], axis=1).astype(np.float32)
    boxes = a.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, np.tile(size, 2))
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept = np.flatnonzero(~a.crowd & ~flat)
    kept = kept[np.argsort(image[kept], kind='stable')]
    return {
        'ids': ids,
        'files': a.files[order],
        'heights': heights.astype(np.int32),
        'widths': widths.astype(np.int32),
        'rows': order,
        'boxes': boxes[kept],
        'labels': a.labels[kept].astype(np.int32),
        'first': np.searchsorted(image[kept], np.arange(len(ids) + 1)),
        'classes': dict(a.categories),
        'dropped': {'crowd': int(a.crowd.sum()), 'no area': int((flat & ~a.crowd).sum())},
    }


def _stamp(path):
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {
        'version': INDEX,
        'size': path.stat().st_size,
        'time': path.stat().st_mtime_ns,
        'sha256': digest,
    }


def _read_index(index, source):
    """The arrays kept in an index file, or None where there is none or it is not of this source."""
    try:
        with np.load(index) as stored:
            about = json.loads(stored['about'].item())
            stat, stamp = source.stat(), about.pop('stamp')
            if stamp['version'] != INDEX or stamp['size'] != stat.st_size:
                return None
            if stamp['time'] != stat.st_mtime_ns and stamp['sha256'] != _stamp(source)['sha256']:
                return None
            about['classes'] = {int(number): name for number, name in about['classes'].items()}
            return {name: stored[name] for name in stored.files if name != 'about'} | about
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there, or damaged: it is made again


def _write_index(index, source, found):
    about = {name: found[name] for name in ('classes', 'dropped')} | {'stamp': _stamp(source)}
    arrays = {name: values for name, values in found.items() if name not in about}
    with files.replacing(index) as file:
        np.savez(file, about=json.dumps(about), **arrays)
