"""Average precision of matched detections, for any weights of the images.

R recall levels; the other letters as in `outcomes`.
"""

from typing import NamedTuple

import numba
import numpy as np

from yolos_jax.analysis.outcomes import Outcomes

RECALLS = np.linspace(0, 1, 101)
RESAMPLES = 200  # of a bootstrap


class Curves(NamedTuple):
    """Precision [T, R, K] at each recall level, and the largest recall [T, K].

    Both are -1 for classes without objects.
    """

    precision: np.ndarray
    recall: np.ndarray

    def ap(self, threshold: int | slice = slice(None), classes: np.ndarray | slice = slice(None)) -> float:
        """The mean over IoU thresholds (or the one at this index), recall levels and classes; or -1."""
        return _mean(self.precision[threshold][..., classes])

    def ar(self, classes: np.ndarray | slice = slice(None)) -> float:
        """The mean of the largest recall over thresholds and classes; or -1."""
        return _mean(self.recall[:, classes])

    def by_class(self, threshold: int | slice = slice(None)) -> np.ndarray:
        """The AP of each class [K]."""
        precision = self.precision[threshold]
        return precision.reshape(-1, precision.shape[-1]).mean(axis=0)


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if len(valid) else -1.0


def curves(outcomes: Outcomes, weights: np.ndarray | None = None) -> Curves:
    """Precision at the recall levels, as COCO's evaluation interpolates it.

    weights: numbers or bool [n], how often each image counts; once when None.
    """
    weights = np.ones(len(outcomes.split.image_ids)) if weights is None else weights
    return _curves(_rank(outcomes, np.flatnonzero(weights)), weights)


def bootstrap(outcomes: Outcomes, weights: np.ndarray) -> tuple[float, float]:
    """A 95 % bootstrap interval of the AP: the images with a weight are drawn with replacement, 200 times.

    Draws without an object have no AP and are ignored; if no draw has an object, both ends are -1.
    """
    members, random = np.flatnonzero(weights), np.random.default_rng(0)
    ranked, values = _rank(outcomes, members), []
    for _ in range(RESAMPLES):
        drawn = np.bincount(random.choice(members, len(members)), minlength=len(weights))
        values.append(_curves(ranked, drawn).ap())
    low, high = np.percentile([ap for ap in values if ap > -1] or [-1], (2.5, 97.5))
    return float(low), float(high)


class _Ranked(NamedTuple):
    """The detections in some images, by class, best first: class k has first[k] up to first[k + 1]."""

    first: np.ndarray
    images: np.ndarray
    right: np.ndarray  # [T, d]
    ignored: np.ndarray  # [T, d]
    object_images: np.ndarray  # of the objects that are to be found
    object_classes: np.ndarray


def _rank(outcomes: Outcomes, members: np.ndarray) -> _Ranked:
    split = outcomes.split
    rows = np.flatnonzero(np.isin(split.detected_images, members))
    rows = rows[np.lexsort((-split.scores[rows], split.detected_classes[rows]))]
    return _Ranked(
        np.searchsorted(split.detected_classes[rows], np.arange(len(split.class_ids) + 1)),
        split.detected_images[rows],
        np.ascontiguousarray(outcomes.matched[rows].T >= 0),
        np.ascontiguousarray(outcomes.ignored[rows].T),
        split.images[outcomes.counted],
        split.classes[outcomes.counted],
    )


def _curves(ranked: _Ranked, weights: np.ndarray) -> Curves:
    weights, K = weights.astype(np.float64), len(ranked.first) - 1
    objects = np.bincount(ranked.object_classes, weights[ranked.object_images], K)
    T = len(ranked.right)
    result = Curves(np.full((T, len(RECALLS), K), -1.0), np.full((T, K), -1.0))
    of_detections = weights[ranked.images]
    _accumulate(ranked.first, ranked.right, ranked.ignored, of_detections, objects, RECALLS, *result)
    return result


@numba.njit(nogil=True, cache=True)
def _accumulate(first, right, ignored, weights, objects, recalls, precision, largest):
    """COCOeval.accumulate, with a weight for each detection."""
    for k in range(len(objects)):
        if objects[k] == 0:
            continue
        size = first[k + 1] - first[k]
        recall, height = np.empty(size), np.empty(size)
        for t in range(len(precision)):
            hits, misses, count = 0.0, 0.0, 0
            for i in range(first[k], first[k + 1]):
                if ignored[t, i] or weights[i] == 0:
                    continue
                if not right[t, i]:  # recall stays and precision falls: no point to keep
                    misses += weights[i]
                    continue
                hits += weights[i]
                recall[count] = hits / objects[k]
                height[count] = hits / (misses + hits + np.spacing(1.0))
                count += 1
            for i in range(count - 1, 0, -1):  # the best precision at this recall or a larger one
                height[i - 1] = max(height[i - 1], height[i])
            largest[t, k] = recall[count - 1] if count else 0
            at = 0
            for r in range(len(recalls)):
                while at < count and recall[at] < recalls[r]:
                    at += 1
                precision[t, r, k] = height[at] if at < count else 0
