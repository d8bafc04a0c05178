"""The images of a split and their objects, as flat arrays that the rest of the data path reads."""

import dataclasses
import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from yolos_jax import files
from yolos_jax.data import alike, annotations, sources
from yolos_jax.data.problems import check_annotations
from yolos_jax.errors import InputError

INDEX_VERSION = 2
# of an index: arrays, and what its JSON has
COLUMNS = 'ids', 'files', 'heights', 'widths', 'rows', 'boxes', 'labels', 'first'
PLAIN = 'classes', 'category_ids', 'dropped', 'notes'
LARGEST_CLASS = 9999  # the largest category id that is used as a label itself


@dataclasses.dataclass(frozen=True)
class Records:
    """n images, sorted by id, and their m objects.

    ids int64 [n]; files str [n]; heights, widths int32 [n]; rows int64 [n], the row of each image in the
    annotation file or data set; boxes float32 [m, 4] xyxy in pixels, inside the image and with an area;
    labels int32 [m]; first int64 [n + 1]: image i has the objects first[i] up to
    first[i + 1]; classes: {label: name}; category_ids: {label: category id}; dropped: {reason: count} of
    annotations that are not targets; notes: what a reader should know, a line each; images: a
    `folders.Folder`, `folders.BucketFolder` or `array_records.Split`; source: where they come from;
    bad_images: how many images may turn out to be unreadable.

    Labels are category ids, as in DETR; where one is above 9999, the classes are numbered in the order of
    their ids instead.
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
    category_ids: dict
    dropped: dict
    notes: list
    images: Any
    source: sources.Source
    bad_images: int
    advice: ClassVar[str] = ': yolos check lists them all'  # for the error if more are bad

    def __len__(self) -> int:
        return len(self.ids)

    def objects(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [k, 4] and labels [k] of image i; a negative i counts from the end."""
        i = range(len(self))[i]
        span = slice(self.first[i], self.first[i + 1])
        return self.boxes[span], self.labels[span]

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return self.images.name(self.files[i])

    def start_read(self, i: int) -> Callable[[], bytes]:
        """A function that returns the bytes of image i, or raises InputError; it requests them at once."""
        return self.images.start_read(self.files[i], self.rows[i])

    def truth(self) -> annotations.Annotations:
        """The annotations to evaluate these images against, as in the annotation file, with crowds."""
        return annotations.of_images(self.source.read_truth(), self.ids)

    def truth_in(self, root: str | Path) -> annotations.Annotations:
        """As `truth`, with file names relative to `root` if the images are files in that folder."""
        a, prefix = self.truth(), self.images.prefix(root)
        if prefix is None:
            return a
        names = dict(zip(self.ids.tolist(), self.files.tolist(), strict=True))
        return dataclasses.replace(a, files=np.array([prefix + names[i] for i in a.ids.tolist()], str))

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """A hash of each aspect in which two data sets may differ."""
        sha256 = lambda *parts: hashlib.sha256(b''.join(parts)).hexdigest()
        return {
            'classes': sha256(json.dumps(sorted(self.classes.items())).encode()),
            'image ids': sha256(self.ids.tobytes()),
            'file names': sha256(self.files.tobytes()),
            'image sizes': sha256(self.heights.tobytes(), self.widths.tobytes()),
            'boxes': sha256(self.boxes.tobytes(), self.first.tobytes()),
            'labels': sha256(self.labels.tobytes()),
        }

    @property
    def num_classes(self) -> int:
        """Size of the class head without "no object": raw ids index it, as in DETR."""
        return max(self.classes) + 1

    @property
    def why_no_objects(self) -> str:
        """What a message says where `boxes` is empty."""
        counts = ', '.join(f'{count} {reason}' for reason, count in self.dropped.items() if count)
        return f'not one object to train on ({counts})' if counts else 'not one object is annotated'


def read(root: str | Path, split: str, index: str | Path | None = None) -> Records:
    """The records of a split of `root`, a data set in one of the layouts of `sources.find`.

    index: a folder to keep the arrays in, so that a later start need not read the annotations again.

    Raises:
        InputError: as `from_source`, or there is no such data set or split.
    """
    return from_source(sources.find(root, split), index and Path(index) / f'{split}.npz')


def from_source(
    source: sources.Source, index: Path | None = None, bad_images: int | None = None
) -> Records:
    """The records of a source.

    Crowd boxes are not targets; boxes are clamped to the image, and those without an area dropped
    (ConvertCocoPolysToMask of the reference). Images without objects stay.

    index: a file to keep the arrays in. They are rebuilt when the size of the annotation file or its
    content changes.
    bad_images: how many images may turn out to be unreadable; None: `annotations.tolerated`.

    Raises:
        InputError: a file or folder is missing or empty, the JSON is not COCO's, an id occurs twice or
            is unknown, a box is not finite, or an image file named in the JSON does not exist.
    """
    index = index if source.stamped else None
    arrays = index and _read_index(index, source)
    if not arrays:
        stamp = index and _stamp(source)
        arrays = flatten(source.load())
        if index and _stamp(source) == stamp:  # else the file was replaced while it was read
            _write_index(index, stamp, arrays)
    images, arrays['files'] = source.images(arrays['files'])
    if missing := images.missing(arrays['files']):
        raise InputError(
            f'{images}: {len(missing)} of {len(arrays["ids"])} images of {source.path} do '
            f'not exist, the first is {missing[0]}'
        )
    bad_images = annotations.tolerated(len(arrays['ids'])) if bad_images is None else bad_images
    return Records(**arrays, images=images, source=source, bad_images=bad_images)


def split_by_fraction(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """Split records in two, the second with about a fraction of the images, drawn by seed.

    Images that are near duplicates by their names stay together (`alike`).

    Raises:
        InputError: one part would have no images.
    """
    groups = alike.groups(records.files.tolist(), records.labels, records.first, fraction)
    place = {name: i for i, name in enumerate(np.random.default_rng(seed).permutation(sorted(set(groups))))}
    order = np.argsort([place[name] for name in groups], kind='stable')
    names = np.array(groups)[order]
    ends = np.flatnonzero(names[1:] != names[:-1]) + 1  # of groups, which are never split
    if not len(ends):
        reason = 'its images are all alike by name' if len(records) > 1 else 'it has only one image'
        raise InputError(f'{records.source.path}: {reason}; no part can be taken')
    enough = np.searchsorted(ends, max(round(fraction * len(records)), 1))
    count = ends[min(enough, len(ends) - 1)]
    return select(records, np.sort(order[count:])), select(records, np.sort(order[:count]))


def split_by_ids(records: Records, ids: np.ndarray) -> tuple[Records, Records]:
    """Split records in two, the second with the images of these ids."""
    second = np.isin(records.ids, ids)
    return select(records, np.flatnonzero(~second)), select(records, np.flatnonzero(second))


def select(r: Records, rows: np.ndarray) -> Records:
    """The records of some images, in the order of `rows`: indices, also from the end, or a mask."""
    rows = np.arange(len(r))[rows]
    counts = np.diff(r.first)[rows]
    first = np.concatenate([[0], np.cumsum(counts)])
    objects = np.repeat(r.first[rows] - first[:-1], counts) + np.arange(first[-1])
    columns = {name: getattr(r, name)[rows] for name in ('ids', 'files', 'heights', 'widths', 'rows')}
    return dataclasses.replace(r, **columns, boxes=r.boxes[objects], labels=r.labels[objects], first=first)


def labels(numbers: Iterable[int]) -> dict[int, int]:
    """{category id: label}: the ids themselves or, if one is above 9999, their ranks."""
    ordered = sorted(numbers)
    return {number: i if ordered[-1] > LARGEST_CLASS else number for i, number in enumerate(ordered)}


def numbered(names: dict[int, str]) -> tuple[dict[int, str], dict[int, int]]:
    """Classes {category id: name} as {label: name} and {label: category id}."""
    number = {label: category for category, label in labels(names).items()}  # in ascending order
    return {label: names[category] for label, category in number.items()}, number


def flatten(a: annotations.Annotations) -> dict:
    """The arrays of `Records` from `annotations.Annotations`; raises InputError as `check_annotations`."""
    problems = check_annotations(a)
    label = labels(number for number, _ in a.categories)
    notes = [*a.notes, *map(str, problems)]
    if max(label) > LARGEST_CLASS:
        notes.append(f'category ids up to {max(label)}: the classes are numbered in their order, from 0')
    order = np.argsort(a.ids)
    ids, heights, widths = a.ids[order], a.heights[order], a.widths[order]
    image = np.searchsorted(ids, a.owners)
    size = np.stack([widths[image], heights[image]], axis=1).astype(np.float32)
    boxes = a.boxes.astype(np.float32)
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
        'labels': np.array([label[number] for number in a.labels[kept].tolist()], np.int32),
        'first': np.searchsorted(image[kept], np.arange(len(ids) + 1)),
        'classes': {label[number]: name for number, name in a.categories},
        'category_ids': {i: number for number, i in label.items()},
        'notes': notes,
        'dropped': {'crowd': int(a.crowd.sum()), 'no area': int((flat & ~a.crowd).sum())},
    }


def _stamp(source: sources.Source) -> dict:
    digest, stat = files.sha256(source.stamped), source.stamped.stat()
    of_file = {'size': stat.st_size, 'time': stat.st_ctime_ns, 'sha256': digest}
    return {'version': INDEX_VERSION, 'data': source.version, **of_file}


def _read_index(index: Path, source: sources.Source) -> dict | None:
    """The arrays kept in an index file, or None if there is none or it is of another source."""
    try:
        with np.load(index) as stored:
            if stored.zip.testzip():  # numpy reads an array by its header before the checksum is compared
                return None
            about = json.loads(stored['about'].item())
            stat, stamp = source.stamped.stat(), about.pop('stamp')
            if stamp['version'] != INDEX_VERSION or stamp['size'] != stat.st_size:
                return None
            if stamp.get('data', '') != source.version:
                return None
            if stamp['time'] != stat.st_ctime_ns and stamp['sha256'] != _stamp(source)['sha256']:
                return None
            for name in ('classes', 'category_ids'):
                about[name] = {int(label): value for label, value in about[name].items()}
            return {name: stored[name] for name in COLUMNS} | {name: about[name] for name in PLAIN}
    except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError):  # NotImplementedError too
        return None  # missing or damaged: it is made again
    except (zipfile.BadZipFile, zlib.error):
        return None


def _write_index(index: Path, stamp: dict, arrays: dict) -> None:
    about = {name: arrays[name] for name in PLAIN} | {'stamp': stamp}
    columns = {name: arrays[name] for name in COLUMNS}
    with files.replacing(index) as file:
        np.savez(file, about=json.dumps(about), **columns)
