"""AP of parts of a split: by size, shape and number of objects, and by any field of the annotation file.

The letters are those of `outcomes`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from yolos_jax.analysis.outcomes import Outcomes, Split, match
from yolos_jax.analysis.precision import bootstrap, curves
from yolos_jax.data import annotations
from yolos_jax.data.annotations import Annotations
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError

FEW_IMAGES, FEW_OBJECTS = 20, 50  # below these a group's AP says little
MOST_GROUPS = 30  # values of a field
SIZES = {  # COCO's three, with small and large split in two: side of a square of the same area, in pixels
    'tiny (side below 16 pixels)': (0, 16), 'small (16 to 32)': (16, 32), 'medium (32 to 96)': (32, 96),
    'large (96 to 288)': (96, 288), 'huge (from 288)': (288, np.inf),
}  # fmt: skip
SHAPES = {  # width / height
    'very tall (width : height below 1 : 3)': (0, 1 / 3), 'tall (1 : 3 to 2 : 3)': (1 / 3, 2 / 3),
    'square (2 : 3 to 3 : 2)': (2 / 3, 3 / 2), 'wide (3 : 2 to 3 : 1)': (3 / 2, 3),
    'very wide (from 3 : 1)': (3, np.inf),
}  # fmt: skip
CROWDING = {  # objects in the image
    '1': (1, 2), '2 to 4': (2, 5), '5 to 9': (5, 10), '10 to 19': (10, 20), '20 or more': (20, np.inf),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Group:
    """A part of a split: its images and objects, AP, AP50 and AR100 (-1 without an object).

    interval: the 95 % interval of its AP over resamples of its images, None if not computed.
    """

    name: str
    images: int
    objects: int
    ap: float
    ap50: float
    ar: float
    interval: tuple[float, float] | None = None

    @property
    def is_small(self) -> bool:
        """Whether it has too few images or objects for a meaningful AP."""
        return self.images < FEW_IMAGES or self.objects < FEW_OBJECTS


def of_outcomes(
    name: str, outcomes: Outcomes, images: np.ndarray | None = None, interval: bool = False
) -> Group:
    """The metrics of matched detections in some images, bool [n]; in all when None."""
    split = outcomes.split
    images = np.ones(len(split.image_ids), bool) if images is None else images
    inside = outcomes.counted & images[split.images]
    curve = curves(outcomes, images)
    return Group(
        name,
        images=int(images.sum()),
        objects=int(inside.sum()),
        ap=curve.ap(),
        ap50=curve.ap(0),
        ar=curve.ar(),
        interval=bootstrap(outcomes, images) if interval and inside.any() else None,
    )


def by_size(split: Split) -> list[Group]:
    """Groups by the area of objects, as COCO's AP_small; unmatched detections of another size are ignored.

    An object on a boundary is in the larger group; in COCO it is in both.
    """
    areas = split.detected_boxes[:, 2] * split.detected_boxes[:, 3]
    return _by_range(split, np.sqrt(split.areas), np.sqrt(areas), SIZES)


def by_shape(split: Split) -> list[Group]:
    """Groups by width / height of the boxes; unmatched detections of another shape are ignored."""
    shape = lambda boxes: boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9)
    return _by_range(split, shape(split.boxes), shape(split.detected_boxes), SHAPES)


def _by_range(split: Split, values: np.ndarray, detected: np.ndarray, ranges: dict) -> list[Group]:
    inside = lambda x, low, high: (x >= low) & (x < high)
    return [
        _of_objects(name, match(split, inside(values, *ends), inside(detected, *ends)))
        for name, ends in ranges.items()
    ]


def _of_objects(name: str, outcomes: Outcomes, interval: bool = False) -> Group:
    """As `of_outcomes` over all images, but `images` counts those that have objects of the group."""
    images = len(np.unique(outcomes.split.images[outcomes.counted]))
    return dataclasses.replace(of_outcomes(name, outcomes, interval=interval), images=images)


def by_crowding(outcomes: Outcomes) -> list[Group]:
    """Groups by the number of objects in the image."""
    split = outcomes.split
    counts = np.bincount(split.images[outcomes.counted], minlength=len(split.image_ids))
    return [
        of_outcomes(name, outcomes, (counts >= low) & (counts < high))
        for name, (low, high) in CROWDING.items()
    ]


def by_frequency(outcomes: Outcomes) -> list[Group]:
    """Groups by how often a class occurs: three groups of equally many classes."""
    split, curve = outcomes.split, curves(outcomes)
    counts = np.bincount(split.classes[outcomes.counted], minlength=len(split.class_ids))
    present = np.argsort(counts, kind='stable')[(counts == 0).sum() :]
    result = []
    for name, part in zip(('rare', 'common', 'frequent'), np.array_split(present, 3), strict=True):
        if not len(part):
            continue
        inside = outcomes.counted & np.isin(split.classes, part)
        images = len(np.unique(split.images[inside]))
        least, most = counts[part[[0, -1]]].tolist()
        title = f'{name} ({least if least == most else f"{least} to {most}"} objects a class)'
        numbers = curve.ap(classes=part), curve.ap(0, part), curve.ar(part)
        result.append(Group(title, images, int(inside.sum()), *numbers))
    return result


def by_image_field(outcomes: Outcomes, values: Sequence) -> list[Group]:
    """Groups by a value of each image [n], in the order of the split's images."""
    return [of_outcomes(name, outcomes, where, interval=True) for name, where in _parts(values)]


def by_object_field(split: Split, values: Sequence) -> list[Group]:
    """Groups by a value of each object [m], in the order of the split's objects.

    Objects of other groups are ignored with the detections that match them. A detection that matches
    nothing belongs to no group and counts in each.
    """
    return [_of_objects(name, match(split, inside), interval=True) for name, inside in _parts(values)]


def _parts(values: Sequence) -> list[tuple[str, np.ndarray]]:
    """(text, mask of its entries) for each of the most frequent values, and one for all other values."""
    texts = np.array(['not given' if value is None else str(value) for value in values])
    names, counts = np.unique(texts, return_counts=True)
    names = names[np.argsort(-counts, kind='stable')]
    parts = [(str(name), texts == name) for name in names[:MOST_GROUPS]]
    if len(names) > MOST_GROUPS:
        parts.append((f'{len(names) - MOST_GROUPS} other values', ~np.isin(texts, names[:MOST_GROUPS])))
    return parts


def read_fields(records: Records, truth: Annotations, names: Sequence[str]) -> dict[str, list]:
    """The values of fields for `analyse`, from the annotation file of an evaluation.

    names: 'images.NAME' or 'annotations.NAME'. Returns {name: values}, in the order of the images by id, or
    of the annotations `truth`.

    Raises:
        InputError: there is no such file, or no image or annotation in it has the field.
    """
    result = {}
    for name in names:
        kind, _, field = name.partition('.')
        if kind not in ('images', 'annotations') or not field:
            raise InputError(f'{name}: a field is images.NAME or annotations.NAME', 'by')
        file = records.source.truth
        if file is None:
            raise InputError(f'{records.source.path}: is not a COCO file, so it has no field {name}', 'by')
        owners, values = annotations.read_field(file, kind, field)
        if kind == 'images':
            of_image = dict(zip(owners, values, strict=True))
            result[name] = [of_image[number] for number in np.sort(truth.ids).tolist()]
        else:
            result[name] = [values[i] for i in np.flatnonzero(np.isin(owners, truth.ids))]
    return result
