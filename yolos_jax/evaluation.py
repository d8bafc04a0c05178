"""From detections to COCO's numbers, by pycocotools on the official JSON."""

import contextlib
import io

import jax
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolos_jax import cluster, sharding
from yolos_jax.data import loader

METRICS = 'AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large'.split()


def detect(predict, params, batches, mesh, tick=lambda: None):
    """The detections in every image of `loader.EvalBatches`, as COCO results in the order of the records.

    Each process detects in its own rows; in the end every process has all.

    predict: from `steps.make_predict_step`. tick: called after each batch.
    """
    records, mine = batches.records, sharding.rows_of_process(batches.batch_size, mesh)
    predict = jax.jit(predict, out_shardings=sharding.over_rows(mesh))
    found = []
    with jax.set_mesh(mesh):
        for _, batch, indices in loader.load(batches, range(len(batches)), mine):
            images = sharding.shard({name: batch[name] for name in ('patches', 'grid')}, mesh)
            one = jax.tree.map(sharding.fetch_rows, predict(params, images))
            found.append(one | {'index': indices})
            tick()
    found = {name: cluster.gather(np.concatenate([one[name] for one in found])) for name in found[0]}
    results = []
    for row in np.argsort(found['index'], kind='stable'):
        index = found['index'][row]
        if index >= 0:  # rows that fill up the last batch have no image
            one = {name: values[row] for name, values in found.items()}
            results += to_coco(records.ids[index], one, records.heights[index], records.widths[index])
    return results


def to_coco(image_id, detections, height, width):
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


def score(annotations, results):
    """COCO's twelve numbers and the AP of each class.

    Args:
        annotations: path of the instances JSON. results: list of COCO results (`to_coco`).

    Returns:
        {metric: value} for the names in METRICS, and {class name: AP}; -1 where there is no object.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        truth = COCO(str(annotations))
        known = set(truth.getCatIds())
        results = [dict(r) for r in results if r['category_id'] in known]  # loadRes writes into them
        found = truth.loadRes(results or _nothing(truth))
        evaluation = COCOeval(truth, found, 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval['precision'][:, :, :, 0, 2]  # [IoU, recall, class], all areas, 100 boxes
    classes = {}
    for k, category in enumerate(evaluation.params.catIds):
        valid = precision[:, :, k][precision[:, :, k] > -1]
        classes[truth.cats[category]['name']] = float(valid.mean()) if len(valid) else -1.0
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)), classes


def table(numbers):
    """COCO's twelve numbers as text."""
    values = [f'{name:>10} {numbers[name]:6.3f}' for name in METRICS]
    return '\n'.join(''.join(values[i : i + 6]) for i in (0, 6))


def _nothing(truth):
    """A detection that can match nothing: loadRes refuses an empty list."""
    image, category = truth.getImgIds()[0], truth.getCatIds()[0]
    return [{'image_id': image, 'category_id': category, 'bbox': [0, 0, 0, 0], 'score': 0.0}]
