"""Evaluation: runs a detector over a data set and computes COCO's metrics by pycocotools."""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np

from yolos_jax import losses
from yolos_jax.data import loader, sources
from yolos_jax.data.annotations import Annotations, class_names
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError


def _silent(name: str) -> ModuleType:
    """A module of pycocotools of our own, which prints nothing: stdout belongs to other threads too."""
    spec = importlib.util.find_spec(f'pycocotools.{name}')
    module = importlib.util.module_from_spec(spec)
    module.print = lambda *_, **__: None
    spec.loader.exec_module(module)
    return module


COCO, COCOeval = _silent('coco').COCO, _silent('cocoeval').COCOeval
METRICS = 'AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR100 AR_small AR_medium AR_large'.split()


def detect(
    predict: Callable[[dict], dict],
    batches: loader.Batches,
    *,
    rows: slice = slice(None),
    gather: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    on_batch: Callable[[], None] = lambda: None,
    threads: int | None = None,
) -> dict[str, np.ndarray]:
    """Predictions for every readable image of the batches, in the order of the records.

    Args:
        predict: a prediction or evaluation step of `steps` as a function of a batch, numpy in and out.
        rows: the rows of each batch that this process computes.
        gather: collects the rows of all processes from those of this one (`run.cluster.gather`).
        on_batch: called after each batch. threads: as for `loader.load`.

    Returns:
        The step's outputs [n, ...], and 'index' [n], the record of each.

    Raises:
        InputError: none of the images can be read.
    """
    parts = []
    for _, batch, indices in loader.load(batches, range(len(batches)), rows, threads):
        parts.append(predict(batch) | {'index': indices})
        on_batch()
    outputs = {name: gather(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    order = np.argsort(outputs['index'], kind='stable')
    order = order[outputs['index'][order] >= 0]  # rows that fill up the last batch have no image
    if not len(order):  # an AP of 0 would look like the detector's
        raise InputError('none of the images to evaluate on can be read')
    return {name: values[order] for name, values in outputs.items()}


def to_results(outputs: dict, records: Records, category_of: dict[int, int]) -> list[dict]:
    """The outputs of `detect` as COCO results.

    category_of: {label: category id} (`class_matching.match`); detections with another label are left out.
    """
    results = []
    for row, index in enumerate(outputs['index']):
        of_image = {name: outputs[name][row] for name in ('scores', 'labels', 'boxes')}
        size = records.heights[index], records.widths[index]
        results += to_coco(records.ids[index], of_image, size, category_of)
    return results


def mean_losses(outputs: dict) -> dict[str, float]:
    """The set loss and its parts over all images, from the outputs of `detect` with an evaluation step.

    The class loss is a mean over images, and the box losses over objects (over images, where these are
    more), as in training with one image a group.
    """
    objects = max(int(outputs['objects'].sum()), len(outputs['objects']))
    ce = float(outputs['loss_ce'].mean())
    bbox, giou = (float(outputs[name].sum()) / objects for name in ('loss_bbox', 'loss_giou'))
    return {
        'val_loss': losses.weighted(ce, bbox, giou),
        'val_loss_ce': ce,
        'val_loss_bbox': bbox,
        'val_loss_giou': giou,
    }


def to_coco(
    image_id: int, detections: dict, size: tuple[int, int], category_of: dict[int, int]
) -> list[dict]:
    """One image's detections as COCO results: a list of dicts with 'bbox' xywh in pixels.

    detections: 'scores' [Q], 'labels' [Q] and 'boxes' [Q, 4] xyxy in 0..1, as `steps` predicts them.
    size: height, width. category_of: as for `to_results`.
    """
    height, width = size
    boxes = np.asarray(detections['boxes'], np.float64) * [width, height, width, height]
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            'image_id': int(image_id),
            'category_id': category_of[int(label)],
            'bbox': [round(float(x), 4) for x in box],
            'score': round(float(score), 8),
        }
        for box, label, score in zip(boxes, detections['labels'], detections['scores'], strict=True)
        if int(label) in category_of
    ]


def score(truth: Annotations, results: list[dict]) -> tuple[dict, dict]:
    """COCO's twelve numbers and the AP of each class.

    Args:
        truth: the annotations (`Records.truth`). results: COCO results (`to_coco`).

    Returns:
        {metric: value} for the names in METRICS, and {class name: AP}; -1 if there is no object.
    """
    names, coco = class_names(truth.categories), ground_truth(truth)
    known = set(coco.getCatIds())
    results = [dict(r) for r in results if r['category_id'] in known]  # loadRes writes into them
    if not results:  # loadRes refuses an empty list; this one can match nothing
        of_first = {'image_id': coco.getImgIds()[0], 'category_id': coco.getCatIds()[0]}
        results = [of_first | {'bbox': [0, 0, 0, 0], 'score': 0.0}]
    evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval['precision'][:, :, :, 0, 2]  # [IoU, recall, class], all areas, 100 boxes
    classes = {}
    for k, category in enumerate(evaluation.params.catIds):
        valid = precision[:, :, k][precision[:, :, k] > -1]
        classes[names[category]] = float(valid.mean()) if len(valid) else -1.0
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)), classes


def ground_truth(a: Annotations) -> COCO:
    """The annotations as pycocotools takes them."""
    truth = COCO()
    truth.dataset = coco_content(a)
    truth.createIndex()
    return truth


def coco_content(a: Annotations, *, upright: bool = False) -> dict:
    """The annotations as the content of a COCO file.

    upright: record that boxes refer to photographs turned upright, which `sources.of_json` heeds.

    Missing and negative areas are width x height. Annotations are numbered from 1, because pycocotools
    takes a match with annotation 0 for no match.
    """
    images = zip(*(x.tolist() for x in (a.ids, a.files, a.heights, a.widths)), strict=True)
    objects = zip(
        *(x.tolist() for x in (a.owners, a.labels, a.boxes, a.known_areas(), a.crowd)), strict=True
    )
    return (dict(sources.UPRIGHT) if upright else {}) | {
        'images': [dict(zip(('id', 'file_name', 'height', 'width'), x, strict=True)) for x in images],
        'annotations': [
            dict(id=i, image_id=image, category_id=label, bbox=box, area=area, iscrowd=int(crowd))
            for i, (image, label, box, area, crowd) in enumerate(objects, 1)
        ],
        'categories': [{'id': number, 'name': name} for number, name in a.categories],
    }


def table(numbers: dict[str, float]) -> str:
    """COCO's twelve numbers as text."""
    values = [f'{name:>10} {numbers[name]:6.3f}' for name in METRICS]
    return '\n'.join(''.join(values[i : i + 6]) for i in (0, 6))
