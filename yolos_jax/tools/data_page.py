"""Writes the report of `check_data` as one HTML file with pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolos_jax import files, visualize
from yolos_jax.boxes import cxcywh_to_xyxy
from yolos_jax.data import loader, pixels
from yolos_jax.data.annotations import Annotations
from yolos_jax.data.batches import TrainBatches
from yolos_jax.data.problems import Problem, odd_boxes
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError
from yolos_jax.patches import unpatchify
from yolos_jax.tools import page

SHOWN = 8  # pictures of a kind
SIDE = 480  # of a picture, in pixels


@dataclasses.dataclass(frozen=True)
class Findings:
    """The content of a split and its problems.

    tables: [(title, [(name, value), ...]), ...]; records and batches: None where the annotations stop a
    run; annotations: None where they cannot be read; bad_images: {kind: indices of images} in them.
    """

    split: str
    problems: list[Problem]
    tables: Sequence = ()
    records: Records | None = None
    batches: TrainBatches | None = None
    annotations: Annotations | None = None
    images: object = None
    bad_images: dict = dataclasses.field(default_factory=dict)


def write(
    path: str | Path,
    data: str,
    all_findings: list[Findings],
    notes: Sequence[str],
    font: Path | None = None,
) -> None:
    """Write the report of a data folder's `Findings`, with notes on its splits together, to `path`.

    font: as for `visualize.draw`.
    """
    parts = [page.heading(f'Data check: {data}', 1), *(page.text(f'Note: {note}') for note in notes)]
    parts += [_section(findings, font) for findings in all_findings]
    files.write(path, page.document('Data check', ''.join(parts)))


def _section(findings: Findings, font: Path | None) -> str:
    parts = [page.heading(f'Split {findings.split}')]
    for problem in findings.problems:
        word = 'Stops a run' if problem.stops else 'Note'
        parts.append(page.text(f'{word}: {problem}', 'stops' if problem.stops else ''))
    parts.append(page.row(*(page.table(rows, caption=title) for title, rows in findings.tables)))
    if findings.batches:
        parts.append(page.heading('A batch as the model sees it', 3) + _batch(findings.batches, font))
    if findings.records:
        for title, images in worst(findings).items():
            parts.append(page.heading(title, 3) + ''.join(_stored(findings, i, font) for i in images))
    return ''.join(parts)


def worst(findings: Findings) -> dict[str, list[int]]:
    """{title: indices into `Annotations`} of the images to look at."""
    a, r = findings.annotations, findings.records
    image, flat, outside = odd_boxes(a)
    counts = np.diff(r.first)
    smallest = np.argsort((r.boxes[:, 2:] - r.boxes[:, :2]).prod(axis=1), kind='stable')
    groups = {
        f'Images {kind}': where
        for kind, where in findings.bad_images.items()
        if kind not in ('missing', 'unreadable')
    }
    groups['Boxes without an area in their image'] = image[flat]
    groups['Boxes that leave the image'] = image[outside]
    groups['Most objects'] = r.rows[np.argsort(-counts, kind='stable')[:SHOWN]]
    groups['Smallest objects'] = r.rows[np.searchsorted(r.first, smallest[: 4 * SHOWN], 'right') - 1]
    return {
        title: list(dict.fromkeys(map(int, where)))[:SHOWN] for title, where in groups.items() if len(where)
    }


def _stored(findings: Findings, i: int, font: Path | None) -> str:
    """Image i of the annotations with all its boxes; captions mark crowds."""
    a = findings.annotations
    name = findings.images.name(a.files[i])
    try:
        data = findings.images.start_read(a.files[i], i)()
        upright = findings.images.upright or pixels.size(data, name) != (a.heights[i], a.widths[i])
        image = pixels.to_rgb(pixels.decode(data, name, upright))
    except InputError as error:
        return page.text(str(error))
    rows = np.flatnonzero(a.owners == a.ids[i])
    boxes = visualize.corners(a.boxes[rows])
    names = dict(a.categories)
    captions = [names[a.labels[k]] + (' (crowd)' if a.crowd[k] else '') for k in rows]
    caption = f'{a.files[i]} (id {a.ids[i]}), {image.shape[1]} x {image.shape[0]}, {len(rows)} annotations'
    return page.figure(visualize.draw(image, boxes, a.labels[rows], captions, font), caption, SIDE)


def _batch(batches: TrainBatches, font: Path | None) -> str:
    data = batches.records
    try:
        ((_, batch, indices),) = loader.load(batches, [0])
    except InputError as error:
        return page.text(str(error))
    figures = []
    for row, index in enumerate(indices):
        image = unpatchify(batch['patches'][row], batch['grid'][row])
        valid = batch['valid'][row]
        boxes = cxcywh_to_xyxy(batch['boxes'][row][valid]) * np.tile(image.shape[1::-1], 2)
        labels = batch['labels'][row][valid]
        caption = f'{data.files[index]}, {image.shape[1]} x {image.shape[0]}'
        captions = [data.classes[label] for label in labels.tolist()]
        picture = visualize.draw(image, boxes, labels, captions, font)
        figures.append(page.figure(picture, caption, SIDE))
    return ''.join(figures)
