"""From detections to COCO's numbers, by pycocotools on the official JSON."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolos_jax.data import loader

METRICS = 'AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large'.split()


def detect(
    predict: Callable[[dict], dict],
    batches: loader.EvalBatches,
    *,
    rows: slice = slice(None),
    gather: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    on_batch: Callable[[], None] = lambda: None,
) -> list[dict]:
    """The detections in every image of the batches, as COCO results in the order of the records.

    Args:
        predict: a prediction step of `steps` as a function of a batch, numpy in and out.
        rows: of each batch, that this process detects in.
        gather: the rows of all processes from those of this one (`run.cluster.gather`).
        on_batch: called after each batch.
    """
    records, parts = batches.records, []
    for _, batch, indices in loader.load(batches, range(len(batches)), rows):
        parts.append(predict({name: batch[name] for name in ('patches', 'grid')}) | {'index': indices})
        on_batch()
    detections = {name: gather(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    results = []
    for row in np.argsort(detections['index'], kind='stable'):
        index = detections['index'][row]
        if index >= 0:  # rows that fill up the last batch have no image
            of_image = {name: values[row] for name, values in detections.items()}
            results += to_coco(records.ids[index], of_image, records.heights[index], records.widths[index])
    return results


def to_coco(image_id: int, detections: dict, height: int, width: int) -> list[dict]:
    """One image's detections as COCO results: a list of dicts with 'bbox' xywh in pixels.

    detections: 'scores' [Q], 'labels' [Q] and 'boxes' [Q, 4] xyxy in 0..1, as `steps` predicts them.
    """
    boxes = np.asarray(detections['boxes'], np.float64) * [width, height, width, height]
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            'image_id': int(image_id),
            'category_id': int(label),
            'bbox': [round(float(x), 4) for x in box],
            'score': round(float(score), 8),
        }
        for box, label, score in zip(boxes, detections['labels'], detections['scores'], strict=True)
    ]


def score(annotation_file: str | Path, results: list[dict]) -> tuple[dict, dict]:
    """COCO's twelve numbers and the AP of each class.

    Args:
        annotation_file: the instances JSON. results: COCO results (`to_coco`).

    Returns:
        {metric: value} for the names in METRICS, and {class name: AP}; -1 where there is no object.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        truth = ground_truth(annotation_file)
        known = set(truth.getCatIds())
        results = [dict(r) for r in results if r['category_id'] in known]  # loadRes writes into them
        evaluation = COCOeval(truth, truth.loadRes(results or _nothing(truth)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval['precision'][:, :, :, 0, 2]  # [IoU, recall, class], all areas, 100 boxes
    classes = {}
    for k, category in enumerate(evaluation.params.catIds):
        valid = precision[:, :, k][precision[:, :, k] > -1]
        classes[truth.cats[category]['name']] = float(valid.mean()) if len(valid) else -1.0
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)), classes


def ground_truth(annotation_file: str | Path) -> COCO:
    """The annotations as pycocotools reads them, complete.

    Missing areas and crowd flags are filled in (width x height, no crowd). Annotations are numbered from
    1, for pycocotools takes a match with number 0 for none.
    """
    truth = COCO()
    truth.dataset = json.loads(Path(annotation_file).read_bytes())
    for number, annotation in enumerate(truth.dataset['annotations'], 1):
        _, _, width, height = annotation['bbox']
        area = annotation.get('area')
        annotation['id'], annotation['iscrowd'] = number, int(bool(annotation.get('iscrowd')))
        annotation['area'] = width * height if area is None else area
    truth.createIndex()
    return truth


def table(numbers: dict[str, float]) -> str:
    """COCO's twelve numbers as text."""
    values = [f'{name:>10} {numbers[name]:6.3f}' for name in METRICS]
    return '\n'.join(''.join(values[i : i + 6]) for i in (0, 6))


def _nothing(truth: COCO) -> list[dict]:
    """A detection that can match nothing: loadRes refuses an empty list."""
    image, category = truth.getImgIds()[0], truth.getCatIds()[0]
    return [{'image_id': image, 'category_id': category, 'bbox': [0, 0, 0, 0], 'score': 0.0}]
