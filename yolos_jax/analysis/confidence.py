"""The reliability of scores at IoU 0.5: thresholds, calibration, and the confusion of classes.

The letters are those of `outcomes`.
"""

from typing import NamedTuple

import numpy as np

from yolos_jax.analysis.outcomes import Outcomes, iou

LEAST_SCORE = 0.1  # least score for the calibration: the many detections near 0 would hide all others
BINS = 10


class Threshold(NamedTuple):
    """The score threshold at which a class has its largest F1, and the metrics there."""

    score: float | None
    f1: float | None
    precision: float | None
    recall: float | None


def best_thresholds(outcomes: Outcomes) -> list[Threshold]:
    """The best threshold of each of the K classes; None without objects or without a correct detection."""
    split, counts = outcomes.split, outcomes.counted
    objects = np.bincount(split.classes[counts], minlength=len(split.class_ids))
    kept = np.flatnonzero(~outcomes.ignored[:, 0])
    kept = kept[np.lexsort((-split.scores[kept], split.detected_classes[kept]))]
    first = np.searchsorted(split.detected_classes[kept], np.arange(len(objects) + 1))
    result = []
    for k, count in enumerate(objects):
        rows = kept[first[k] : first[k + 1]]
        hits = np.cumsum(outcomes.matched[rows, 0] >= 0)
        f1 = 2 * hits / (np.arange(1, len(rows) + 1) + count)
        if not count or not len(rows) or not hits[-1]:
            result.append(Threshold(*[None] * 4))
            continue
        is_last = np.diff(split.scores[rows], append=-1) != 0  # no threshold separates equal scores
        best = int(np.where(is_last, f1, -1).argmax())
        at = hits[best]
        result.append(
            Threshold(float(split.scores[rows[best]]), float(f1[best]), at / (best + 1), at / count)
        )
    return result


class Calibration(NamedTuple):
    """For ten bins of scores: the mean score, the share of correct detections, the count; the error (ECE).

    The error is the mean over detections of the distance between mean score and share in their bin.
    """

    score: np.ndarray
    right: np.ndarray
    count: np.ndarray
    error: float


def calibration(outcomes: Outcomes) -> Calibration:
    """The calibration of the detections with a score of at least 0.1."""
    kept = (outcomes.split.scores >= LEAST_SCORE) & ~outcomes.ignored[:, 0]
    scores, right = outcomes.split.scores[kept], outcomes.matched[kept, 0] >= 0
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    mean = lambda x: np.bincount(place, x, BINS) / np.maximum(count, 1)
    score, share = mean(scores), mean(right)
    error = float((count * abs(score - share)).sum() / max(count.sum(), 1))
    return Calibration(score, share, count, error)


def confusion(outcomes: Outcomes, thresholds: np.ndarray) -> np.ndarray:
    """How often an object of a class (rows) is detected as a class (columns); the last is background.

    Detections below the threshold [K] of their class are ignored. Pairs with an IoU above 0.5 are matched
    within a class first, then by falling IoU, each object and detection once. Crowds do not count, nor do
    detections on them.
    """
    split, K = outcomes.split, len(outcomes.split.class_ids)
    matrix = np.zeros((K + 1, K + 1), np.int64)
    kept = np.flatnonzero(split.scores >= thresholds[split.detected_classes])
    objects = np.flatnonzero(~split.crowd)
    for image in np.union1d(split.detected_images[kept], split.images[objects]):
        rows = kept[slice(*np.searchsorted(split.detected_images[kept], [image, image + 1]))]
        truth = objects[slice(*np.searchsorted(split.images[objects], [image, image + 1]))]
        pairs = []
        for i in rows.tolist():
            for k in truth.tolist():
                shared = iou(split.detected_boxes[i], split.boxes[k], False)
                if shared > 0.5:
                    pairs.append((split.classes[k] != split.detected_classes[i], -shared, k, i))
        matched, taken = set(), set()
        for _, _, k, i in sorted(pairs):
            if k not in matched and i not in taken:
                matrix[split.classes[k], split.detected_classes[i]] += 1
                matched.add(k)
                taken.add(i)
        np.add.at(matrix, (split.classes[[k for k in truth if k not in matched]], K), 1)
        wrong = [i for i in rows.tolist() if i not in taken and not outcomes.ignored[i, 0]]
        np.add.at(matrix, (K, split.detected_classes[wrong]), 1)
    return matrix
