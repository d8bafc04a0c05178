"""Writes the report of an evaluation: what a detector finds, its errors by kind, and its AP by groups.

`yolos eval --report` writes it, as one HTML file and, for programs, as report.json.
"""

from pathlib import Path

import numpy as np

from yolos_jax import evaluation, files, visualize
from yolos_jax.analysis import confidence, groups, outcomes, precision, tide
from yolos_jax.analysis.analysis import Analysis
from yolos_jax.analysis.groups import Group
from yolos_jax.analysis.outcomes import Split
from yolos_jax.data.batches import photograph
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError
from yolos_jax.tools import page

FILES = 'report.html', 'report.json'
SHOWN = 8  # pictures of a kind
LARGEST_MATRIX = 30  # most classes for which the confusion matrix is shown
COLOURS = ('#1f6feb', '#d9822b', '#3aa35b')
ERRORS = {
    tide.Kind.CLASS: 'the right place, another class',
    tide.Kind.PLACE: 'the right class, IoU between 0.1 and 0.5',
    tide.Kind.BOTH: 'another class, and IoU between 0.1 and 0.5',
    tide.Kind.DUPLICATE: 'an object that a better detection has found already',
    tide.Kind.BACKGROUND: 'no object: IoU below 0.1 with every object',
    tide.Kind.MISSED: 'objects that no detection points to',
}


def write(
    folder: Path,
    analysis: Analysis,
    records: Records,
    numbers: dict[str, float],
    about: dict[str, str],
    font: Path | None = None,
) -> None:
    """Write report.html and report.json.

    numbers: COCO's twelve (`evaluation.score`); about: what the reader should know of the evaluation; font:
    as for `visualize.draw`.
    """
    split = analysis.outcomes.split
    crowds = int(split.crowd.sum())
    words = (
        f'{len(split.image_ids):,} images, {len(split.images) - crowds:,} objects and {crowds:,} crowds of '
        f'{len(split.class_ids):,} classes; {len(split.scores):,} detections.'
    )
    twelve = [(name, numbers[name] if numbers[name] > -1 else None) for name in evaluation.METRICS]
    body = [
        page.heading('Evaluation', 1),
        page.text(words),
        page.row(page.table(twelve, caption='COCO'), page.table(about.items(), caption='About')),
        _classes(analysis),
        _curves(analysis),
        _errors(analysis),
        _confusion(analysis),
        _calibration(analysis),
        *(_groups(title, members) for title, members in analysis.groups.items()),
        _corrupted(analysis),
        _pictures(analysis, records, font),
    ]
    page_file, numbers_file = (folder / name for name in FILES)
    files.write(page_file, page.document('Evaluation', ''.join(body)))
    files.write_json(numbers_file, analysis.numbers())


def _classes(analysis: Analysis) -> str:
    split, curves = analysis.outcomes.split, analysis.curves
    counted = analysis.outcomes.counted
    objects = np.bincount(split.classes[counted], minlength=len(split.class_ids)).tolist()
    pairs = np.unique(np.stack([split.classes[counted], split.images[counted]]), axis=1)
    images = np.bincount(pairs[0], minlength=len(objects)).tolist()
    blank = lambda values: [value if value > -1 else None for value in values.tolist()]
    ap, ap50, ar = (blank(x) for x in (curves.by_class(), curves.by_class(0), curves.recall.mean(axis=0)))
    rows = zip(split.class_names, objects, images, ap, ap50, ar, analysis.thresholds, strict=True)
    head = ['class', 'objects', 'images', 'AP', 'AP50', 'AR100', 'threshold', 'F1', 'precision', 'recall']
    table = page.table([(*row, *best) for *row, best in rows], head, sorts=True)
    words = (
        'The threshold is the score at which F1, at IoU 0.5, is largest; F1, precision and recall are '
        'those at it. A click on a column sorts by it.'
    )
    return page.heading('Classes') + page.text(words, 'quiet') + table


def _curves(analysis: Analysis) -> str:
    p = analysis.curves.precision
    names = analysis.outcomes.split.class_names
    present = np.flatnonzero(p[0, 0] > -1)
    lines = [page.Line(names[k], precision.RECALLS, p[0, :, k]) for k in present]
    for t, colour in zip((0, 5, 8), COLOURS, strict=True):
        if len(present):
            name = f'mean at IoU {outcomes.THRESHOLDS[t]:.2f}'
            lines.append(page.Line(name, precision.RECALLS, p[t][:, present].mean(axis=1), colour))
    words = 'Thin lines are single classes at IoU 0.5.'
    chart = page.chart(lines, 'recall', 'precision')
    return page.heading('Precision and recall') + page.text(words, 'quiet') + chart


def _errors(analysis: Analysis) -> str:
    costs, counts = analysis.errors.costs, analysis.errors.counts
    most = max(*costs.values(), 1e-9)
    rows = [
        (kind.name.lower(), ERRORS[kind], counts[kind], page.Bar(f'{costs[kind]:.3f}', costs[kind] / most))
        for kind in tide.Kind
    ]
    words = 'By the first kind that applies (TIDE). Its cost is the gain in AP50 if only it were corrected.'
    table = page.table(rows, ['error', 'what it is', 'count', 'AP50 that it costs'])
    return page.heading('Errors by kind') + page.text(words, 'quiet') + table


def _confusion(analysis: Analysis) -> str:
    names = [*analysis.outcomes.split.class_names, 'background']
    matrix = analysis.confusion
    words = (
        'Rows are the objects, columns what they are detected as, for detections above the threshold of '
        'their class; IoU above 0.5. The last row is detections of nothing, the last column objects '
        'not found.'
    )
    parts = [page.heading('Which class is taken for which'), page.text(words, 'quiet')]
    if len(names) <= LARGEST_MATRIX + 1:
        parts.append(page.matrix(matrix, names, names))
    else:
        parts.append(
            page.text(f'{len(names) - 1} classes are too many for a table; report.json has all counts.')
        )
    mixed = matrix[:-1, :-1] * (1 - np.eye(len(names) - 1, dtype=np.int64))
    order = np.argsort(-mixed, axis=None, kind='stable')[:10]
    pairs = [(k // len(mixed), k % len(mixed)) for k in order.tolist()]
    rows = [(names[a], names[b], int(mixed[a, b])) for a, b in pairs if mixed[a, b]]
    if rows:
        parts.append(page.table(rows, ['object', 'detected as', 'count'], 'Most often'))
    return ''.join(parts)


def _calibration(analysis: Analysis) -> str:
    title = page.heading('Can scores be trusted?')
    score, right, count, error = analysis.calibration
    filled = count > 0
    if not filled.any():
        return title + page.text(f'No detection has a score of at least {confidence.LEAST_SCORE}.', 'quiet')
    lines = [
        page.Line('perfect', np.array([0, 1]), np.array([0, 1]), COLOURS[2]),
        page.Line('detections', score[filled], right[filled], COLOURS[0]),
    ]
    words = (
        f'For detections with a score of at least {confidence.LEAST_SCORE}: the share that is right at '
        f'IoU 0.5, by score. Its mean distance from the score, the calibration error (ECE), is {error:.3f}.'
    )
    chart = page.chart(lines, 'score', 'share that is right')
    return title + page.text(words, 'quiet') + chart


def _groups(title: str, members: list[Group]) -> str:
    members = [x for x in members if x.objects]
    if not members:
        return ''
    most = max(x.ap for x in members)
    rows = []
    for x in members:
        ap = page.Bar(f'{x.ap:.3f}', x.ap / max(most, 1e-9))
        interval = f'{x.interval[0]:.3f} to {x.interval[1]:.3f}' if x.interval else ''
        rows.append((x.name, x.images, x.objects, ap, interval, x.ap50, x.ar))
    interval = '95 % interval' if any(x.interval for x in members) else ''
    parts = [
        page.heading(title),
        page.table(rows, ['group', 'images', 'objects', 'AP', interval, 'AP50', 'AR100']),
    ]
    if small := [x.name for x in members if x.is_small]:
        words = (
            f'Too small to say anything about (fewer than {groups.FEW_IMAGES} images or '
            f'{groups.FEW_OBJECTS} objects): {", ".join(small)}.'
        )
        parts.append(page.text(words, 'quiet'))
    if title.startswith('annotations.'):
        words = (
            'Detections of nothing belong to no group and count in each, so a small group has a lower AP '
            'for that alone: compare recall (AR100).'
        )
        parts.append(page.text(words, 'quiet'))
    return ''.join(parts)


def _corrupted(analysis: Analysis) -> str:
    if not analysis.corrupted or analysis.curves.ap() < 0:  # of a split without objects
        return ''
    rows = [(name, *aps) for name, aps in analysis.corrupted.items()]
    words = (
        f'AP under corruptions of the images. Their mean is {analysis.relative_ap():.1%} of the AP '
        f'without, {analysis.curves.ap():.3f}.'
    )
    table = page.table(rows, ['corruption', 'weak', 'medium', 'strong'])
    return page.heading('When the world changes') + page.text(words) + table


def _pictures(analysis: Analysis, records: Records, font: Path | None) -> str:
    kinds, split = analysis.errors.kinds, analysis.outcomes.split
    above = split.scores >= analysis.least_scores[split.detected_classes]
    wrong = np.flatnonzero(kinds >= 0)
    wrong = wrong[np.argsort(-split.scores[wrong], kind='stable')]
    mistakes: dict[int, str] = {}
    with_mistakes = above.copy()
    for i in wrong.tolist():
        name, kind = split.class_names[split.detected_classes[i]], tide.Kind(kinds[i]).name.lower()
        mistakes.setdefault(int(split.detected_images[i]), f'{name} {split.scores[i]:.2f}: {kind}')
        with_mistakes[i] = True  # also below the threshold of its class
        if len(mistakes) == SHOWN:
            break
    how = 'Truth first, then the detections above the threshold of their class'
    parts = []
    for title, images, shown, words in (
        ('The worst images', _worst(analysis, above), above, f'{how}.'),
        ('The most confident mistakes', mistakes, with_mistakes, f'{how}, and the mistakes.'),
    ):
        parts += [page.heading(title), page.text(words if images else 'None.', 'quiet')]
        for image, what in images.items():
            of_image = shown & (split.detected_images == image)
            parts.append(_beside(split, records, image, of_image, what, font))
    return ''.join(parts)


def _worst(analysis: Analysis, above: np.ndarray) -> dict[int, str]:
    """{image: what is wrong} of the images with the lowest F1 at the thresholds, the most errors first."""
    split, matching = analysis.outcomes.split, analysis.outcomes
    n = len(split.image_ids)
    count = lambda images, where: np.bincount(images[where], minlength=n)
    shown = above & ~matching.ignored[:, 0]
    hits = count(split.detected_images, shown & (matching.matched[:, 0] >= 0))
    detections, objects = count(split.detected_images, shown), count(split.images, matching.counted)
    f1 = 2 * hits / np.maximum(detections + objects, 1)
    errors = detections + objects - 2 * hits
    order = np.lexsort((-errors, f1))
    return {
        i: f'{hits[i]} of {objects[i]} objects found, {detections[i] - hits[i]} wrong detections'
        for i in order[errors[order] > 0][:SHOWN].tolist()
    }


def _beside(
    split: Split, records: Records, image: int, shown: np.ndarray, words: str, font: Path | None
) -> str:
    """An image twice: its objects, and the detections to show bool [d]."""
    index = int(np.searchsorted(records.ids, split.image_ids[image]))
    try:
        array = photograph(records, index)
    except InputError as error:
        return page.text(str(error))
    objects, rows = split.objects_of(image), np.flatnonzero(shown)
    names = split.class_names
    labels, crowd = split.classes[objects], split.crowd[objects]
    truth = [names[k] + ' (crowd)' * is_crowd for k, is_crowd in zip(labels, crowd.tolist(), strict=True)]
    detected = split.detected_classes[rows]
    captions = [f'{names[k]} {score:.2f}' for k, score in zip(detected, split.scores[rows], strict=True)]
    boxes, detected_boxes = map(visualize.corners, (split.boxes[objects], split.detected_boxes[rows]))
    pair = [
        visualize.draw(array, boxes, split.class_ids[labels], truth, font),
        visualize.draw(array, detected_boxes, split.class_ids[detected], captions, font),
    ]
    height, width, _ = pair[0].shape
    axis = 0 if width > 2 * height else 1  # a panorama above the other
    gap = np.full((8, width, 3) if axis == 0 else (height, 8, 3), 128, np.uint8)
    both = np.concatenate([pair[0], gap, pair[1]], axis=axis)
    return page.figure(both, f'{records.files[index]}: {words}', 960)
