"""The images of a split and their objects, as flat arrays read once from a COCO JSON file."""

import dataclasses
import mmap
import os
from pathlib import Path

import msgspec
import numpy as np

from yolos_jax.errors import InputError

LARGEST_CLASS = 9999  # a category id is an index into the class head


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    id: int = -1


class _Category(msgspec.Struct):
    id: int
    name: str


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclasses.dataclass(frozen=True)
class Records:
    """n images, sorted by id, and their m objects.

    ids int64 [n]; files: n names inside `folder`; heights, widths int32 [n];
    boxes float32 [m, 4] xyxy in pixels, inside the image and with an area; labels int32 [m] raw category
    ids; first int64 [n + 1]: image i has the objects first[i] up to first[i + 1];
    classes: {category id: name}; dropped: {reason: count} of annotations that are no targets.
    """

    folder: Path
    json: Path
    ids: np.ndarray
    files: list
    heights: np.ndarray
    widths: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    classes: dict
    dropped: dict

    def __len__(self):
        return len(self.ids)

    def objects(self, i):
        """Boxes [k, 4] and labels [k] of image i."""
        span = slice(self.first[i], self.first[i + 1])
        return self.boxes[span], self.labels[span]

    @property
    def num_classes(self):
        """Size of the class head without "no object": raw ids index it, as in DETR."""
        return max(self.classes) + 1


def read_coco(root, split):
    """The records of `root`/annotations/instances_`split`.json with images in `root`/`split`/.

    Crowd boxes are no targets; boxes are clamped to the image, and those without an area dropped
    (ConvertCocoPolysToMask of the reference). Images without objects stay.

    Raises:
        InputError: a file or folder is missing or empty, the JSON is not COCO's, an id stands twice or
            is unknown, or an image file named in the JSON is not there.
    """
    root = Path(root)
    path, folder = root / 'annotations' / f'instances_{split}.json', root / split
    for place, kind in ((root, 'data folder'), (path, 'annotation file'), (folder, 'image folder')):
        if not place.exists():
            raise InputError(f'{place}: no such {kind} (a COCO folder has annotations/ and {split}/)')
    coco = _decode(path)
    if not coco.images:
        raise InputError(f'{path}: lists no images')
    if not coco.categories:
        raise InputError(f'{path}: lists no categories')
    classes = {c.id: c.name for c in coco.categories}
    _check_ids(path, coco, classes)
    images = sorted(coco.images, key=lambda image: image.id)
    records = _flatten(path, folder, images, coco.annotations, classes)
    _check_files(records)
    return records


def read_classes(path):
    """The classes {id: name} of a COCO annotation file; raises InputError as `read_coco`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f'{path}: no such annotation file')
    classes = {c.id: c.name for c in _decode(path).categories}
    if not classes:
        raise InputError(f'{path}: lists no categories')
    return classes


def _decode(path):
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise InputError(f'{path}: is empty')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return msgspec.json.decode(memoryview(data), type=_Coco)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InputError(f'{path}: not a COCO detection file: {error}') from None


def _check_ids(path, coco, classes):
    def repeated(name, ids):
        values, counts = np.unique(np.array(ids), return_counts=True)
        if (counts > 1).any():
            raise InputError(f'{path}: {name} ids stand twice: {values[counts > 1][:5].tolist()}')

    repeated('image', [image.id for image in coco.images])
    repeated('category', [category.id for category in coco.categories])
    repeated('annotation', [a.id for a in coco.annotations if a.id != -1])
    if min(classes) < 0 or max(classes) > LARGEST_CLASS:
        raise InputError(
            f'{path}: category ids {min(classes)}..{max(classes)}; they index the class head and must '
            f'be within 0..{LARGEST_CLASS}: renumber them'
        )


def _flatten(path, folder, images, annotations, classes):
    ids = np.array([image.id for image in images], np.int64)
    heights = np.array([image.height for image in images], np.int32)
    widths = np.array([image.width for image in images], np.int32)
    if min(heights.min(), widths.min()) < 1:
        bad = images[int(np.minimum(heights, widths).argmin())]
        raise InputError(f'{path}: image id {bad.id} is {bad.height}x{bad.width}')

    m = len(annotations)
    owner = np.fromiter((a.image_id for a in annotations), np.int64, m)
    labels = np.fromiter((a.category_id for a in annotations), np.int64, m)
    crowd = np.fromiter((a.iscrowd for a in annotations), bool, m)
    boxes = np.empty((m, 4), np.float32)
    for row, annotation in zip(boxes, annotations, strict=True):
        row[:] = annotation.bbox
    for what, values, known in (('image', owner, ids), ('category', labels, list(classes))):
        lost = np.flatnonzero(~np.isin(values, known))
        if len(lost):
            raise InputError(
                f'{path}: {len(lost)} annotations name an unknown {what}, the first is annotation id '
                f'{annotations[lost[0]].id} with {what}_id {values[lost[0]]}'
            )

    image = np.searchsorted(ids, owner)
    size = np.stack([widths[image], heights[image]], axis=1).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, np.tile(size, 2))
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept = np.flatnonzero(~crowd & ~flat)
    kept = kept[np.argsort(image[kept], kind='stable')]
    return Records(
        folder=folder,
        json=path,
        ids=ids,
        files=[image.file_name for image in images],
        heights=heights,
        widths=widths,
        boxes=boxes[kept],
        labels=labels[kept].astype(np.int32),
        first=np.searchsorted(image[kept], np.arange(len(ids) + 1)),
        classes=classes,
        dropped={'crowd': int(crowd.sum()), 'no area': int((flat & ~crowd).sum())},
    )


def _check_files(records):
    root = os.path.realpath(records.folder)
    present = set()
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        present.update(names if inside == '.' else (f'{inside}/{name}' for name in names))
    missing = []
    for name in records.files:
        if os.path.isabs(name) or '..' in Path(name).parts:
            raise InputError(f'{records.json}: file_name {name!r} points outside {records.folder}')
        if os.path.normpath(name) not in present:
            missing.append(name)
    if missing:
        raise InputError(
            f'{records.folder}: {len(missing)} of {len(records)} images named in {records.json.name} '
            f'are not there, the first is {missing[0]}'
        )
