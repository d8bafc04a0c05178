"""Finds problems in annotations: those that stop a run, and boxes that are dropped, cut or look odd."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yolos_jax.data.annotations import Annotations
from yolos_jax.data.folders import YOLO_FILES
from yolos_jax.errors import InputError
from yolos_jax.naming import has_controls

SUSPICIOUS = 0.2  # a larger share of boxes that leave their image is suspicious
LARGEST_BOX = 1e38  # training computes in float32


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is wrong: what, how often, a few examples, and whether it stops a run."""

    what: str
    count: int
    examples: list
    stops: bool

    def __str__(self) -> str:
        if not self.examples:
            return self.what
        shown = ', '.join(str(example) for example in self.examples)
        return f'{self.count} {self.what}: {shown}' + (', ...' if self.count > len(self.examples) else '')


class _Check(NamedTuple):
    """A row of the table of checks."""

    what: str
    where: np.ndarray  # bool or indices: of images, categories or annotations
    example: Callable[[int], Any]  # what to call one of them


def find_problems(a: Annotations) -> list[Problem]:
    """The problems that stop a run or, only if there are none, the other problems."""
    empty = [('images', a.ids), ('categories', a.categories)]
    stopping = [Problem(what, 0, ['the list is empty'], True) for what, x in empty if not len(x)]
    stopping += _failed(_checks(a), stops=True)
    return stopping or _failed(_box_checks(a), stops=False)


def check_annotations(a: Annotations) -> list[Problem]:
    """As `find_problems`, but raises InputError for the first problem that stops a run."""
    problems = find_problems(a)
    for problem in problems:
        if problem.stops:
            raise InputError(f'{a.path}: {problem}')
    return problems


def _failed(checks: list[_Check], *, stops: bool) -> list[Problem]:
    """The problems of the checks that find something."""
    result = []
    for what, where, example in checks:
        where = np.flatnonzero(where) if where.dtype == bool else where
        if len(where):
            result.append(Problem(what, len(where), [example(i) for i in where[:5]], stops))
    return result


def _checks(a: Annotations) -> list[_Check]:
    """The checks for problems that stop a run."""
    category_ids = np.array([number for number, _ in a.categories], np.int64)
    annotation_ids = a.annotation_ids[a.annotation_ids != -1]
    unprintable = [not name or has_controls(name) for name in a.files.tolist()]
    named_oddly = [has_controls(name) for _, name in a.categories]
    image = lambda i: f'image id {a.ids[i]}'
    annotation = lambda i: f'annotation id {a.annotation_ids[i]}'
    return [
        _Check('image ids that occur twice', _repeated(a.ids), int),
        _Check('category ids that occur twice', _repeated(category_ids), int),
        _Check('annotation ids that occur twice', _repeated(annotation_ids), int),
        _Check('category ids below 0', category_ids < 0, lambda i: category_ids[i]),
        _Check(
            'categories with control characters in their name',
            np.array(named_oddly, bool),
            lambda i: f'category id {category_ids[i]} {a.categories[i][1]!r}',
        ),
        _Check(
            'images without a size',
            (a.heights < 1) | (a.widths < 1),
            lambda i: f'{image(i)} is {a.widths[i]} x {a.heights[i]}',
        ),
        _Check(
            'image files without a name, or with control characters in it',
            np.array(unprintable, bool),
            lambda i: f'{image(i)} {str(a.files[i])!r}',
        ),
        _Check(
            'annotations of an unknown image',
            ~np.isin(a.owners, a.ids),
            lambda i: f'{annotation(i)} (image_id {a.owners[i]})',
        ),
        _Check(
            'annotations of an unknown category',
            ~np.isin(a.labels, category_ids),
            lambda i: f'{annotation(i)} (category_id {a.labels[i]})',
        ),
        _Check('boxes that are not finite', ~(np.abs(a.boxes) < LARGEST_BOX).all(axis=1), annotation),
    ]


def _repeated(values: np.ndarray) -> np.ndarray:
    """The values that occur more than once."""
    values, counts = np.unique(values, return_counts=True)
    return values[counts > 1]


def _box_checks(a: Annotations) -> list[_Check]:
    """The checks for what is dropped, cut or suspicious, for annotations that do not stop a run."""
    image, flat, outside = odd_boxes(a)
    is_yolo = Path(a.path).suffix in YOLO_FILES
    number = '' if is_yolo else 'annotation id {} in '  # rows of YOLO's have none
    annotation = lambda i: number.format(a.annotation_ids[i]) + a.files[image[i]]
    names = np.array([name.lower() for _, name in a.categories])
    many = outside.sum() > max(SUSPICIOUS * len(outside), 5)
    form = 'YOLO has the centre, then width and height' if is_yolo else 'COCO has x, y, width, height'
    hint = f'; are they x, y, x, y? {form}' if many else ''
    return [
        _Check(
            'boxes, all within 0..1 (are they normalised? COCO boxes are in pixels)',
            np.full(len(a.boxes), (a.boxes <= 1).all()),
            annotation,
        ),
        _Check('categories with the same name', _repeated(names), str),
        _Check('image files under two ids', _repeated(a.files), str),
        _Check('objects that repeat an earlier one under another id', _again(a), annotation),
        _Check('boxes without an area in their image (not trained on)', flat, annotation),
        _Check(f'boxes that leave the image by more than a pixel (cut{hint})', outside, annotation),
    ]


def _again(a: Annotations) -> np.ndarray:
    """The annotations with the image, category and box of an earlier one."""
    columns = a.owners, a.labels, *a.boxes.T
    order = np.lexsort(columns)
    same = np.all([values[order][1:] == values[order][:-1] for values in columns], axis=0)
    return np.sort(order[1:][same])


def odd_boxes(a: Annotations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image (its row in the file) of each annotation [m], which boxes are dropped, and which leave it.

    A box without an area in its image is dropped; another box leaves it if it is out by more than a pixel.
    Crowds count as neither. The annotations must have no problem that stops a run.
    """
    order = np.argsort(a.ids)
    image = order[np.searchsorted(a.ids[order], a.owners)]
    size = np.stack([a.widths[image], a.heights[image]], axis=1)
    low, high = a.boxes[:, :2], a.boxes[:, :2] + a.boxes[:, 2:]
    flat = ~(np.minimum(high, size) > np.maximum(low, 0)).all(axis=1)
    outside = ((low < -1) | (high > size + 1)).any(axis=1)
    return image, flat & ~a.crowd, outside & ~flat & ~a.crowd
