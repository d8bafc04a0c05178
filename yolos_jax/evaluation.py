"""Evaluation: runs a detector over a data set and computes COCO's metrics by pycocotools."""

import contextlib
import dataclasses
import io
from collections.abc import Callable

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolos_jax import losses
from yolos_jax.data import loader, sources
from yolos_jax.data.annotations import Annotations, class_names
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError, shown
from yolos_jax.weights.pretrained import Pretrained

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


def to_results(outputs: dict, records: Records, labels: dict[int, int]) -> list[dict]:
    """The outputs of `detect` as COCO results.

    labels: {label: category id} (`category_ids`); detections with another label are left out.
    """
    results = []
    for row, index in enumerate(outputs['index']):
        of_image = {name: outputs[name][row] for name in ('scores', 'labels', 'boxes')}
        size = records.heights[index], records.widths[index]
        results += to_coco(records.ids[index], of_image, size, labels)
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


def to_coco(image_id: int, detections: dict, size: tuple[int, int], labels: dict[int, int]) -> list[dict]:
    """One image's detections as COCO results: a list of dicts with 'bbox' xywh in pixels.

    detections: 'scores' [Q], 'labels' [Q] and 'boxes' [Q, 4] xyxy in 0..1, as `steps` predicts them.
    size: height, width. labels: as for `to_results`.
    """
    height, width = size
    boxes = np.asarray(detections['boxes'], np.float64) * [width, height, width, height]
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            'image_id': int(image_id),
            'category_id': labels[int(label)],
            'bbox': [round(float(x), 4) for x in box],
            'score': round(float(score), 8),
        }
        for box, label, score in zip(boxes, detections['labels'], detections['scores'], strict=True)
        if int(label) in labels
    ]


def category_ids(pretrained: Pretrained, records: Records) -> tuple[dict[int, int], list[str]]:
    """The category id in the annotations for each label of a detector, and notes for the reader.

    The same number with the same name is the same class; where numbers differ, names decide.

    Args:
        pretrained: the detector. records: what it is evaluated on.

    Returns:
        {label: category id}, and lines for the reader.

    Raises:
        InputError: they have no class in common.
    """
    classes, ids = pretrained.classes, pretrained.category_ids
    data_names = {records.category_ids[label]: name.lower() for label, name in records.classes.items()}
    own_names = {ids[label]: name.lower() for label, name in classes.items()}
    names = {*data_names.values()}
    if data_names == {number: name for number, name in own_names.items() if name in names}:
        return ids, []
    used = {records.category_ids[label] for label in np.unique(records.labels).tolist()}
    # of one name the last that has objects: exports of Roboflow have an unused category beside one
    by_use = sorted(data_names.items(), key=lambda item: item[0] in used)
    by_name = {name: number for number, name in by_use}
    labels = {}
    for label, name in ((label, name.lower()) for label, name in classes.items()):
        if name in by_name:
            same = data_names.get(ids[label]) == name and (ids[label] in used or by_name[name] not in used)
            labels[label] = ids[label] if same else by_name[name]
    if not labels:
        raise InputError(
            f'{records.source.path}: none of its classes ({shown(data_names.values())}) is among the '
            f'classes of the detector ({shown(classes.values())})'
        )
    notes = []
    if len(by_name) < len(data_names):
        notes.append(
            f'{records.source.path}: of classes with one name, only the last with objects can be detected'
        )
    if any(ids[label] != number for label, number in labels.items()):
        notes.append(f'{records.source.path}: its classes are numbered differently, and matched by name')
    detected = {data_names[number] for number in labels.values()}
    absent = [name for name in data_names.values() if name not in detected]
    if absent:
        notes.append(f'{records.source.path}: classes that cannot be detected: {shown(absent)}')
    return labels, notes


def relabelled(records: Records, labels: dict[int, int]) -> Records:
    """Records whose objects have the labels of a detector; objects that it cannot detect are left out.

    labels: as `category_ids` gives them.
    """
    label = {category: label for label, category in labels.items()}
    new = np.array([label.get(records.category_ids[x], -1) for x in records.labels.tolist()], np.int32)
    kept = new >= 0
    first = np.concatenate([[0], np.cumsum(kept)])[records.first]
    return dataclasses.replace(records, labels=new[kept], boxes=records.boxes[kept], first=first)


def score(truth: Annotations, results: list[dict]) -> tuple[dict, dict]:
    """COCO's twelve numbers and the AP of each class.

    Args:
        truth: the annotations (`Records.truth`). results: COCO results (`to_coco`).

    Returns:
        {metric: value} for the names in METRICS, and {class name: AP}; -1 if there is no object.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
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
