"""What `check_data` reports as one HTML file, with pictures."""

import base64
import dataclasses
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from yolos_jax import files, visualize
from yolos_jax.data import annotations, loader, pixels, records
from yolos_jax.data.annotations import Annotations, Problem
from yolos_jax.errors import InputError
from yolos_jax.patches import unpatchify

SHOWN = 8  # pictures of a kind

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
table { border-collapse: collapse; display: inline-table; vertical-align: top; margin: 0 2em 1em 0 }
caption { text-align: left; font-weight: 600 } td { padding: 1px 1em 1px 0; border-bottom: 1px solid #ddd }
.stops { color: #b00 } figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top }
figcaption { font-size: 12px; max-width: 360px; overflow-wrap: anywhere }
img { max-width: 360px; max-height: 360px }
"""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is in a split, and what is wrong with it.

    tables: [(title, [(name, value), ...]), ...]; records and batches: None where the annotations stop a
    run; bad_images: {kind: indices of images} in `annotations`.
    """

    split: str
    problems: list[Problem]
    tables: list
    records: records.Records | None
    batches: loader.TrainBatches | None
    annotations: Annotations
    images: object
    bad_images: dict


def write(path: str | Path, all_findings: list[Findings]) -> None:
    """Write the report of a list of `Findings` to `path`."""
    body = ''.join(_section(findings) for findings in all_findings)
    page = f'<!doctype html><meta charset="utf-8"><title>Data check</title><style>{STYLE}</style>{body}'
    with files.replacing(path) as file:
        file.write(page.encode())


def _section(findings: Findings) -> str:
    parts = [f'<h1>{html.escape(findings.split)}</h1>']
    for problem in findings.problems:
        kind, word = ('stops', 'Stops a run') if problem.stops else ('note', 'Note')
        parts.append(f'<p class="{kind}">{word}: {html.escape(str(problem))}</p>')
    for title, rows in findings.tables:
        cells = ''.join(f'<tr><td>{html.escape(a)}<td>{html.escape(b)}' for a, b in rows)
        parts.append(f'<table><caption>{html.escape(title)}</caption>{cells}</table>')
    if findings.batches:
        parts.append('<h2>A batch as the model sees it</h2>' + _batch(findings.batches))
    if findings.records:
        for title, images in worst(findings).items():
            parts.append(f'<h2>{html.escape(title)}</h2>' + ''.join(_stored(findings, i) for i in images))
    return ''.join(parts)


def worst(findings: Findings) -> dict[str, list[int]]:
    """{title: indices into `Annotations`} of the images to look at."""
    a, r = findings.annotations, findings.records
    image, flat, outside = annotations.odd_boxes(a)
    counts = np.diff(r.first)
    smallest = np.argsort((r.boxes[:, 2:] - r.boxes[:, :2]).prod(axis=1), kind='stable')
    groups = {
        f'Images {kind}': where
        for kind, where in findings.bad_images.items()
        if kind not in ('missing', 'unreadable')
    }
    groups['Boxes without an area'] = image[flat]
    groups['Boxes that leave the image'] = image[outside]
    groups['Most objects'] = r.rows[np.argsort(-counts, kind='stable')[:SHOWN]]
    groups['Smallest objects'] = r.rows[np.searchsorted(r.first, smallest[: 4 * SHOWN], 'right') - 1]
    return {
        title: list(dict.fromkeys(map(int, where)))[:SHOWN] for title, where in groups.items() if len(where)
    }


def _stored(findings: Findings, i: int) -> str:
    """Image i of the annotations with all its boxes, crowds dashed by their caption."""
    a = findings.annotations
    name = findings.images.name(a.files[i])
    try:
        data = findings.images.read(a.files[i], i)
        upright = pixels.size(data, name) != (a.heights[i], a.widths[i])
        image = pixels.to_rgb(pixels.decode(data, name, upright))
    except InputError as error:
        return f'<p>{html.escape(str(error))}</p>'
    rows = np.flatnonzero(a.owners == a.ids[i])
    boxes = a.boxes[rows].copy()
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 0) + boxes[:, :2]
    names = dict(a.categories)
    captions = [names[a.labels[k]] + (' (crowd)' if a.crowd[k] else '') for k in rows]
    caption = f'{a.files[i]} (id {a.ids[i]}), {image.shape[1]} x {image.shape[0]}, {len(rows)} annotations'
    return _figure(visualize.draw(image, boxes, a.labels[rows], captions), caption)


def _batch(batches: loader.TrainBatches) -> str:
    records = batches.records
    try:
        ((_, batch, indices),) = loader.load(batches, [0])
    except InputError as error:
        return f'<p>{html.escape(str(error))}</p>'
    figures = []
    for row, index in enumerate(indices):
        image = unpatchify(batch['patches'][row], batch['grid'][row])
        valid = batch['valid'][row]
        centre, size = np.split(batch['boxes'][row][valid], 2, axis=1)
        corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        boxes = corners * np.tile([image.shape[1], image.shape[0]], 2)
        labels = batch['labels'][row][valid]
        caption = f'{records.files[index]}, {image.shape[1]} x {image.shape[0]}'
        picture = visualize.draw(
            image, boxes, labels, [records.classes[label] for label in labels.tolist()]
        )
        figures.append(_figure(picture, caption))
    return ''.join(figures)


def _figure(image: np.ndarray, caption: str) -> str:
    picture, file = Image.fromarray(image), io.BytesIO()
    picture.thumbnail((720, 720))
    picture.save(file, 'jpeg', quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    image = f'<img src="data:image/jpeg;base64,{data}">'
    return f'<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>'
