"""The images of a split and their objects, as flat arrays: what everything else starts from."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax import files
from yolos_jax.data import annotations, sources
from yolos_jax.errors import InputError

INDEX_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Records:
    """n images, sorted by id, and their m objects.

    ids int64 [n]; files str [n]; heights, widths int32 [n]; rows int64 [n], the row of each image in the
    annotation file or data set; boxes float32 [m, 4] xyxy in pixels, inside the image and with an area;
    labels int32 [m] raw category ids; first int64 [n + 1]: image i has the objects first[i] up to
    first[i + 1]; classes: {category id: name}; dropped: {reason: count} of annotations that are no
    targets; annotation_file: the JSON for evaluation; images: a `sources.Folder` or `array_records.Images`.
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
    annotation_file: Path
    images: Any

    def __len__(self) -> int:
        return len(self.ids)

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [k, 4] and labels [k] of image i."""
        span = slice(self.first[i], self.first[i + 1])
        return self.boxes[span], self.labels[span]

    def name(self, i: int) -> str:
        """How to name image i to a reader."""
        return self.images.name(self.files[i])

    def read(self, i: int) -> bytes:
        """The encoded bytes of image i; raises InputError where they cannot be read."""
        return self.images.read(self.files[i], self.rows[i])

    def digest(self) -> str:
        """A text that is the same for the same data, in whichever form it is stored."""
        return hashlib.sha256(json.dumps(self.digests()).encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """As `digest`, for each of the things that two data sets may differ in."""
        columns = {
            'image ids': (self.ids,),
            'file names': (self.files,),
            'image sizes': (self.heights, self.widths),
            'boxes': (self.boxes, self.first),
            'labels': (self.labels,),
        }
        digests = {'classes': hashlib.sha256(json.dumps([*self.classes.items()]).encode())}
        for name, arrays in columns.items():
            digests[name] = hashlib.sha256()
            for array in arrays:
                digests[name].update(np.ascontiguousarray(array))
        return {name: digest.hexdigest() for name, digest in digests.items()}

    @property
    def num_classes(self) -> int:
        """Size of the class head without "no object": raw ids index it, as in DETR."""
        return max(self.classes) + 1


def read(root: str | Path, split: str, index: str | Path | None = None) -> Records:
    """The records of a split of `root`, a COCO folder or a data set of tensorflow-datasets.

    A COCO folder has annotations/instances_`split`.json and the images in `split`/; for the other see
    `array_records`. Crowd boxes are no targets; boxes are clamped to the image, and those without an area
    dropped (ConvertCocoPolysToMask of the reference). Images without objects stay.

    index: a folder to keep the arrays in, so that a later start need not read the annotations again.
    They are made anew when the size of the annotation file or its content changes.

    Raises:
        InputError: a file or folder is missing or empty, the JSON is not COCO's, an id occurs twice or
            is unknown, a box is not finite, or an image file named in the JSON is not there.
    """
    source = sources.find(root, split)
    index = index and Path(index) / f'{split}.npz'
    arrays = index and _read_index(index, source.stamped)
    if not arrays:
        arrays = flatten(source.load())
        if index:
            _write_index(index, source.stamped, arrays)
    if missing := source.images.missing(arrays['files']):
        raise InputError(
            f'{source.images.path}: {len(missing)} of {len(arrays["ids"])} images of '
            f'{source.annotation_file.name} are not there, the first is {missing[0]}'
        )
    return Records(**arrays, annotation_file=source.annotation_file, images=source.images)


def flatten(a: annotations.Annotations) -> dict:
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


def _stamp(path: Path) -> dict:
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    stat = path.stat()
    return {'version': INDEX_VERSION, 'size': stat.st_size, 'time': stat.st_mtime_ns, 'sha256': digest}


def _read_index(index: Path, source: Path) -> dict | None:
    """The arrays kept in an index file, or None where there is none or it is not of this source."""
    try:
        with np.load(index) as stored:
            about = json.loads(stored['about'].item())
            stat, stamp = source.stat(), about.pop('stamp')
            if stamp['version'] != INDEX_VERSION or stamp['size'] != stat.st_size:
                return None
            if stamp['time'] != stat.st_mtime_ns and stamp['sha256'] != _stamp(source)['sha256']:
                return None
            about['classes'] = {int(number): name for number, name in about['classes'].items()}
            return {name: stored[name] for name in stored.files if name != 'about'} | about
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there, or damaged: it is made again


def _write_index(index: Path, source: Path, arrays: dict) -> None:
    about = {name: arrays[name] for name in ('classes', 'dropped')} | {'stamp': _stamp(source)}
    columns = {name: values for name, values in arrays.items() if name not in about}
    with files.replacing(index) as file:
        np.savez(file, about=json.dumps(about), **columns)
