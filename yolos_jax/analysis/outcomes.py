"""COCO's matching of detections and objects at ten thresholds of IoU, as arrays.

pycocotools keeps its matches in a dict for each image and class. Columns take a fraction of the time, and
allow the AP of any part: of groups of images, of groups of objects, and of resamples.

m objects, d detections, n images, K classes, T thresholds of IoU. Objects and detections are sorted by
image, then class; detections of one image and class by falling score.
"""

import dataclasses
from collections.abc import Sequence

import numba
import numpy as np

from yolos_jax.data.annotations import Annotations, class_names

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
MOST = 100  # detections of a class that count in an image
LARGEST_AREA = 1e5**2  # of an object that counts


@dataclasses.dataclass(frozen=True)
class Split:
    """The objects of a split and the detections in it.

    image_ids int64 [n], rising; class_ids int64 [K], rising; class_names: K texts.
    Of objects: images, classes int64 [m], indices into those; boxes float64 [m, 4] xywh in pixels; areas
    float64 [m]; crowd bool [m]; rows int64 [m], their rows in the annotations.
    Of detections: detected_images, detected_classes int64 [d]; detected_boxes [d, 4]; scores [d].
    """

    image_ids: np.ndarray
    class_ids: np.ndarray
    class_names: list[str]
    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    rows: np.ndarray
    detected_images: np.ndarray
    detected_classes: np.ndarray
    detected_boxes: np.ndarray
    scores: np.ndarray

    def objects_of(self, image: int) -> slice:
        """The objects of an image."""
        return slice(*np.searchsorted(self.images, [image, image + 1]).tolist())


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """How a split's detections and objects match.

    matched int32 [d, T]: the object that each detection matches, -1 for none; ignored bool [d, T]: whether
    it counts neither as right nor as wrong; counted bool [m]: the objects to be found.
    """

    split: Split
    matched: np.ndarray
    ignored: np.ndarray
    counted: np.ndarray


def columns(truth: Annotations, results: Sequence[dict]) -> Split:
    """Annotations and COCO results as columns.

    As in COCO's evaluation, results are dropped if the annotations do not have their image or category, and
    so are all but the best 100 of a class in an image.
    """
    image_ids, class_ids = np.sort(truth.ids), np.sort([number for number, _ in truth.categories])
    names = class_names(truth.categories)
    images, classes = np.searchsorted(image_ids, truth.owners), np.searchsorted(class_ids, truth.labels)
    rows = np.lexsort((classes, images))

    column = lambda name, kind: np.fromiter((x[name] for x in results), kind, len(results))
    boxes = np.fromiter((side for x in results for side in x['bbox']), np.float64, 4 * len(results))
    of_image, of_class, scores = column('image_id', int), column('category_id', int), column('score', float)
    known = np.isin(of_image, image_ids) & np.isin(of_class, class_ids)
    of_image, of_class = np.searchsorted(image_ids, of_image), np.searchsorted(class_ids, of_class)
    order = np.lexsort((-scores, of_class, of_image))
    order = order[known[order]]
    key = of_image[order] * len(class_ids) + of_class[order]
    order = order[np.arange(len(key)) - np.searchsorted(key, key) < MOST]
    return Split(
        image_ids=image_ids,
        class_ids=class_ids,
        class_names=[names[number] for number in class_ids.tolist()],
        images=images[rows],
        classes=classes[rows],
        boxes=truth.boxes[rows],
        areas=truth.known_areas()[rows],
        crowd=truth.crowd[rows],
        rows=rows,
        detected_images=of_image[order],
        detected_classes=of_class[order],
        detected_boxes=boxes.reshape(-1, 4)[order],
        scores=scores[order],
    )


def match(
    split: Split, objects_in: np.ndarray | bool = True, detections_in: np.ndarray | bool = True
) -> Outcomes:
    """Match detections to objects as COCO's evaluation does.

    objects_in: bool [m], the objects to be found; others are ignored with the detections that match them,
        as crowds always are. detections_in: bool [d], the detections that count as wrong if they match
        nothing; others are ignored then. For COCO's AP_small both masks are by area.
    """
    key = split.images * len(split.class_ids) + split.classes
    detected_key = split.detected_images * len(split.class_ids) + split.detected_classes
    groups = np.unique(detected_key)
    spans = [np.searchsorted(x, groups, side) for x in (detected_key, key) for side in ('left', 'right')]
    counted = ~split.crowd & (split.areas <= LARGEST_AREA) & objects_in
    matched = np.full((len(detected_key), len(THRESHOLDS)), -1, np.int32)
    _match(*spans, split.detected_boxes, split.boxes, split.crowd, counted, THRESHOLDS, matched)
    ignored = np.where(
        matched >= 0, ~np.append(counted, False)[matched], ~np.asarray(detections_in)[..., None]
    )
    return Outcomes(split, matched, ignored, counted)


@numba.njit(nogil=True, cache=True)
def iou(box, other, crowd):
    """Intersection over union of two xywh boxes; for a crowd, over the area of the first box."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared, area = width * height, box[2] * box[3]
    return shared / (area if crowd else area + other[2] * other[3] - shared)


@numba.njit(nogil=True, cache=True)
def _match(start, end, first, last, detected, boxes, crowd, counted, thresholds, matched):
    """COCOeval.evaluateImg: by falling score, each takes the best object that is left, ignored ones last.

    Group i has the detections start[i] up to end[i] and the objects first[i] up to last[i].
    """
    for i in range(len(start)):
        objects = last[i] - first[i]
        if objects == 0:
            continue
        ious = np.empty((end[i] - start[i], objects))
        for row in range(len(ious)):
            for k in range(objects):
                ious[row, k] = iou(detected[start[i] + row], boxes[first[i] + k], crowd[first[i] + k])
        for t in range(len(thresholds)):
            free = np.ones(objects, np.bool_)
            for row in range(len(ious)):
                best = _best(ious[row], free & counted[first[i] : last[i]], thresholds[t])
                if best < 0:
                    best = _best(ious[row], free & ~counted[first[i] : last[i]], thresholds[t])
                if best >= 0:
                    free[best] = crowd[first[i] + best]  # a crowd may match any number of detections
                    matched[start[i] + row, t] = first[i] + best


@numba.njit(nogil=True, cache=True)
def _best(ious, allowed, threshold):
    """The allowed object with the largest IoU, the last of equals; -1 if none reaches the threshold."""
    best, most = -1, min(threshold, 1 - 1e-10)
    for k in range(len(ious)):
        if allowed[k] and ious[k] >= most:
            best, most = k, ious[k]
    return best
