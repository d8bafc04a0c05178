"""Errors by kind, and the AP that each kind costs: TIDE (Bolya et al., arXiv 2008.08115).

The kind of a wrong detection is the first that applies: right class but badly placed, another class,
duplicate, background, or badly placed and another class. Objects that no error points to are missed. The
cost of a kind is the gain in AP at IoU 0.5 if its errors were corrected. The letters are those of
`outcomes`.
"""

import enum
from typing import NamedTuple

import numba
import numpy as np

from yolos_jax.analysis.outcomes import Outcomes, Split, iou
from yolos_jax.analysis.precision import RECALLS
from yolos_jax.numba_cache import renamed

RIGHT_IOU, BACKGROUND_IOU = 0.5, 0.1
SAME, OTHER, USED = 0, 1, 2  # kinds of objects for `_nearest`


class Kind(enum.IntEnum):
    """Kinds of errors."""

    CLASS = 0
    PLACE = 1
    BOTH = 2
    DUPLICATE = 3
    BACKGROUND = 4
    MISSED = 5


class Errors(NamedTuple):
    """The errors in a split.

    kinds int [d]: of each detection, -1 if right or ignored. costs, counts: the cost and the
    number of errors of each kind; as in TIDE, the number includes crowds.
    """

    kinds: np.ndarray
    costs: dict[Kind, float]
    counts: dict[Kind, int]


def errors(outcomes: Outcomes) -> Errors:
    """The errors of a split's detections at IoU 0.5."""
    split, ignored, counted = outcomes.split, outcomes.ignored[:, 0], outcomes.counted
    if not len(split.images):
        kinds = np.where(ignored, -1, Kind.BACKGROUND)
        counts = dict.fromkeys(Kind, 0) | {Kind.BACKGROUND: len(kinds)}
        return Errors(kinds, dict.fromkeys(Kind, 0.0), counts)
    right = (outcomes.matched[:, 0] >= 0) & ~ignored
    used = np.zeros(len(split.images), bool)
    used[outcomes.matched[right, 0]] = True
    ious, objects = _nearest(split, counted, used)
    same, other, duplicated = ious
    kinds = np.select(
        [
            right,
            (same >= BACKGROUND_IOU) & (same <= RIGHT_IOU),
            other >= RIGHT_IOU,
            duplicated >= RIGHT_IOU,
            np.maximum(same, other) <= BACKGROUND_IOU,
        ],
        [-1, Kind.PLACE, Kind.CLASS, Kind.DUPLICATE, Kind.BACKGROUND],
        Kind.BOTH,
    )
    target = np.where(kinds == Kind.PLACE, objects[SAME], objects[OTHER])
    mendable = np.isin(kinds, (Kind.PLACE, Kind.CLASS)) & ~used[target]
    best = _best_of_each(target, mendable, split.scores)
    missed = counted & ~used
    missed[target[mendable]] = False

    per_class = np.bincount(split.classes[counted], minlength=len(split.class_ids))
    kept = ~ignored
    before = _ap(split.detected_classes[kept], split.scores[kept], right[kept], per_class, per_class)
    costs = {}
    for kind in Kind:
        wrong = kinds == kind
        mended = wrong & best
        classes = np.where(mended, split.classes[target], split.detected_classes)
        kept = ~ignored & ~wrong | mended
        taken = np.bincount(split.classes[missed], minlength=len(per_class)) * (kind == Kind.MISSED)
        remaining = per_class - taken
        after = _ap(classes[kept], split.scores[kept], (right | mended)[kept], remaining, per_class)
        costs[kind] = max(after - before, 0.0)
    counts = {kind: int((kinds == kind).sum()) for kind in Kind} | {Kind.MISSED: int(missed.sum())}
    return Errors(np.where(ignored, -1, kinds), costs, counts)


def _nearest(split: Split, counted: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest IoU of each detection with three kinds of objects, and its object (0 for none): [3, d].

    The kinds are objects of the same class, objects of another class, and objects of the same class that
    a detection has matched already.
    """
    d = len(split.scores)
    ious, objects = np.zeros((3, d)), np.zeros((3, d), np.int64)
    first = np.searchsorted(split.images, split.detected_images)
    last = np.searchsorted(split.images, split.detected_images, 'right')
    detected = split.detected_classes, split.detected_boxes
    _fill(first, last, *detected, split.classes, split.boxes, counted, used, ious, objects)
    return ious, objects


@numba.njit(nogil=True, cache=True)
@renamed
def _fill(first, last, detected_classes, detected, classes, boxes, counted, used, ious, objects):
    for i in range(len(first)):
        for k in range(first[i], last[i]):
            if not counted[k]:
                continue
            shared = iou(detected[i], boxes[k], False)
            if classes[k] != detected_classes[i]:
                if shared > ious[OTHER, i]:
                    ious[OTHER, i], objects[OTHER, i] = shared, k
                continue
            if shared > ious[SAME, i]:
                ious[SAME, i], objects[SAME, i] = shared, k
            if used[k] and shared > ious[USED, i]:
                ious[USED, i], objects[USED, i] = shared, k


def _best_of_each(target: np.ndarray, mendable: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """bool [d]: the best mendable detection of each object, the one that would match it if corrected."""
    rows = np.flatnonzero(mendable)
    rows = rows[np.lexsort((-scores[rows], target[rows]))]
    best = np.zeros(len(target), bool)
    best[rows[np.diff(target[rows], prepend=-1) != 0]] = True
    return best


def _ap(
    classes: np.ndarray, scores: np.ndarray, correct: np.ndarray, remaining: np.ndarray, objects: np.ndarray
) -> float:
    """The mean AP at one IoU threshold; classes, scores, correct: of the detections.

    objects [K]: of each class; remaining [K]: those that are not taken away. As in TIDE, the AP of a class
    that lost all of them is 0 if there are detections of it; without any the class is not in the mean.
    """
    order = np.lexsort((-scores, classes))
    first = np.searchsorted(classes[order], np.arange(len(remaining) + 1))
    values = []
    for k in np.flatnonzero(remaining):
        hits = np.cumsum(correct[order[first[k] : first[k + 1]]])
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        values.append(precision[np.searchsorted(hits / remaining[k], RECALLS)].mean())
    emptied = (objects > 0) & (remaining == 0) & (np.diff(first) > 0)
    values += [0.0] * emptied.sum()
    return float(np.mean(values)) if values else 0.0
