"""Time and memory of an evaluation's report for as much as COCO's validation split has.

    python benchmarks/report.py

5,000 images, 36,000 objects of 80 classes, 500,000 detections; with two fields to group by.
"""

import argparse
import resource
import time

import numpy as np

from yolos_jax.analysis import outcomes
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data.annotations import Annotations

IMAGES, OBJECTS, DETECTIONS, CLASSES = 5_000, 36_000, 500_000, 80


def main():
    argparse.ArgumentParser(description=__doc__.split('\n')[0]).parse_args()
    random = np.random.default_rng(0)
    boxes = lambda n: np.concatenate(
        [random.uniform(0, 400, (n, 2)), random.uniform(5, 200, (n, 2))], axis=1
    )
    ids, owners = np.arange(1, IMAGES + 1), np.sort(random.integers(1, IMAGES + 1, OBJECTS))
    labels = np.minimum(random.geometric(0.05, OBJECTS), CLASSES)  # few classes are most objects
    truth_boxes = boxes(OBJECTS)
    truth = Annotations(
        path=None,
        ids=ids,
        files=np.array([f'{i}.jpg' for i in ids]),
        heights=np.full(IMAGES, 480),
        widths=np.full(IMAGES, 640),
        annotation_ids=np.arange(OBJECTS),
        owners=owners,
        labels=labels,
        crowd=random.random(OBJECTS) < 0.01,
        areas=truth_boxes[:, 2] * truth_boxes[:, 3],
        boxes=truth_boxes,
        categories=[(k, f'class {k}') for k in range(1, CLASSES + 1)],
    )
    source, near = random.integers(0, OBJECTS, DETECTIONS), random.random(DETECTIONS) < 0.3
    moved = truth_boxes[source] + random.normal(0, 8, (DETECTIONS, 4))
    detected = np.maximum(np.where(near[:, None], moved, boxes(DETECTIONS)), 1)
    of_image = np.where(near, owners[source], np.repeat(ids, DETECTIONS // IMAGES))
    right = random.random(DETECTIONS) < 0.8
    of_class = np.where(right, labels[source], random.integers(1, CLASSES + 1, DETECTIONS))
    columns = zip(
        of_image.tolist(),
        of_class.tolist(),
        detected.tolist(),
        (random.random(DETECTIONS) ** 3).tolist(),
        strict=True,
    )
    results = [dict(image_id=i, category_id=k, bbox=box, score=score) for i, k, box, score in columns]
    fields = {'images.four': (ids % 4).tolist(), 'annotations.five': (np.arange(OBJECTS) % 5).tolist()}
    analyse(outcomes.columns(truth, results[:1000]), fields)  # compiles
    for name, by in (('report', {}), ('with two fields, 9 groups', fields)):
        clock = time.perf_counter()
        analysis = analyse(outcomes.columns(truth, results), by)
        print(f'{name}: {time.perf_counter() - clock:.1f} s, AP {analysis.curves.ap():.4f}')
    print(
        f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, results included'
    )


if __name__ == '__main__':
    main()
