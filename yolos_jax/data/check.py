"""Look at a data set before training on it.

    python -m yolos_jax.data.check DIR [--split=NAME ...] [--html=FILE] [--config=configs/yolos_ti.py]

reads every annotation and decodes every image of a COCO folder (or data set of tensorflow-datasets), and
prints what is wrong, what training leaves out, the classes, the sizes, and how much padding the config's
recipe would have (YOLOS-S's without one). --html adds pictures: the worst images, and a batch as the model
sees it. The exit status is 1 where something would stop a run.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import runpy
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from yolos_jax import cli
from yolos_jax.data import annotations, geometry, loader, pixels, records, report, tfds
from yolos_jax.data.annotations import Problem
from yolos_jax.errors import InputError

RECIPE = geometry.Recipe(tuple(range(480, 801, 16)), 1333)  # of YOLOS-S, S (dWr) and B
SLOTS = 100  # targets of an image, as many as the [DET] tokens of the published models
TURNED = 'turned by EXIF'


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in a split.

    problems: list of `annotations.Problem`; tables: [(title, [(name, value), ...]), ...]; records and
    batches: None where the annotations stop a run; odd: {kind: indices of images} in `annotations`.
    """

    split: str
    problems: list
    tables: list
    records: records.Records | None
    batches: loader.TrainBatches | None
    annotations: annotations.Annotations
    images: object
    odd: dict


def splits(root):
    """The names of the splits of a data folder; raises InputError where there are none."""
    if tfds.is_dataset(root):
        return tfds.splits(root)
    names = sorted(path.stem.removeprefix('instances_') for path in (root / 'annotations').glob('*.json'))
    names = [name for name in names if (root / 'annotations' / f'instances_{name}.json').exists()]
    if not names:
        raise InputError(f'{root}: no annotations/instances_*.json, and no dataset_info.json')
    return names


def examine(root, split, recipe=RECIPE, num_lengths=8, batch_size=8):
    """Everything there is to say about a split: `Findings`."""
    source = records.Source.find(root, split)
    a = source.load()
    problems = annotations.problems(a)
    if any(problem.stops for problem in problems):
        return Findings(split, problems, [], None, None, a, source.images, {})
    more, odd = check_images(source.images, a)
    problems = sorted([*problems, *more], key=lambda problem: not problem.stops)
    found = records.Records(**records.flatten(a), json=source.json, images=source.images)
    described, batches = tables(found), None
    if len(found) >= batch_size:
        batches = loader.TrainBatches.make(found, recipe, num_lengths, batch_size, SLOTS, 0, 1 + SLOTS)
        lengths, waste = batches.waste()
        described.append(
            ('Sequences', [('lengths', ' '.join(map(str, lengths))), ('padding', f'{waste:.1%}')])
        )
    return Findings(split, problems, described, found, batches, a, source.images, odd)


def check_images(images, a):
    """Decode every image of `Annotations`: a list of `Problem`, and {kind: indices of images}."""
    missing = set(images.missing(a.files))
    odd, texts = collections.defaultdict(list), collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(lambda i: _look(images, a, i, missing), range(len(a.ids)))
        for i, (kind, text) in enumerate(tqdm(jobs, total=len(a.ids), unit='image', leave=False)):
            if kind:
                odd[kind].append(i)
                texts[kind].append(text)
    bad = sum(len(where) for kind, where in odd.items() if not kind.startswith(TURNED))
    too_many = bad > loader.TOLERATED * len(a.ids)
    stops = lambda kind: kind == 'missing' or too_many and not kind.startswith(TURNED)
    return [Problem(f'images {kind}', len(texts[kind]), texts[kind][:5], stops(kind)) for kind in odd], odd


def _look(images, a, i, missing):
    name, annotated = images.name(a.files[i]), (a.heights[i], a.widths[i])
    if a.files[i] in missing:
        return 'missing', name
    try:
        data = images.read(a.files[i], i)
        height, width, _ = pixels.decode(data, name).shape
    except InputError as error:
        return 'unreadable', str(error)
    turned = pixels.orientation(data)
    if (height, width) == annotated:
        return (f'{TURNED}, annotated and used as stored', name) if turned > 1 else (None, name)
    if turned > 4 and (width, height) == annotated:
        return f'{TURNED}, annotated and used upright', name
    sizes = f'{height}x{width}, annotated {annotated[0]}x{annotated[1]}'
    return 'of another size than annotated', f'{name} is {sizes}'


def tables(r):
    """What `Records` hold, as [(title, [(name, value), ...]), ...]."""
    counts, areas = np.diff(r.first), (r.boxes[:, 2:] - r.boxes[:, :2]).prod(axis=1)
    part = lambda where: f'{where.sum():,} ({where.mean():.1%})' if len(where) else '0'
    shapes = collections.Counter(zip(r.widths.tolist(), r.heights.tolist(), strict=True))
    image = np.repeat(np.arange(len(r)), counts)
    objects = np.bincount(r.labels, minlength=r.num_classes)
    images = np.bincount(np.unique(np.stack([image, r.labels]), axis=1)[1], minlength=r.num_classes)
    return [
        (
            'Images',
            [
                ('in all', f'{len(r):,}'),
                ('without objects', part(counts == 0)),
                (f'with more than {SLOTS} objects', part(counts > SLOTS)),
                ('objects in one', f'{counts.mean():.1f} on average, {counts.max()} at most'),
            ],
        ),
        (
            f'Sizes, the commonest of {len(shapes)}',
            [(f'{w} x {h}', f'{n:,} ({n / len(r):.1%})') for (w, h), n in shapes.most_common(8)],
        ),
        (
            'Objects',
            [
                ('to train on', f'{len(r.boxes):,}'),
                ('crowds, left out', f'{r.dropped["crowd"]:,}'),
                ('without an area, left out', f'{r.dropped["no area"]:,}'),
                ('small, below 32 x 32', part(areas < 32**2)),
                ('medium', part((areas >= 32**2) & (areas < 96**2))),
                ('large, from 96 x 96', part(areas >= 96**2)),
            ],
        ),
        (
            'Classes',
            [
                (f'{c} {name}', f'{objects[c]:,} in {images[c]:,} images')
                for c, name in sorted(r.classes.items())
            ],
        ),
    ]


def text(findings):
    """`Findings` for the terminal."""
    lines = [f'== {findings.split} ==']
    for problem in findings.problems:
        lines.append(f'{"STOPS A RUN" if problem.stops else "note"}: {problem}')
    for title, rows in findings.tables:
        lines += ['', title, *(f'  {name:<30} {value}' for name, value in rows)]
    return '\n'.join(lines)


def main():
    """Parse the arguments and check."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', type=Path, help='a COCO folder, or a data set of tensorflow-datasets')
    parser.add_argument('--split', nargs='*', help='those to check (all)')
    parser.add_argument('--html', type=Path, help='a file for the report with pictures')
    parser.add_argument('--config', help='a file of configs/, for its recipe (that of YOLOS-S)')
    args = parser.parse_args()
    options = {}
    if args.config:
        config = runpy.run_path(args.config)['get_config']()
        options = {'recipe': geometry.Recipe(**config.augment), 'num_lengths': config.num_lengths}
    every = []
    for split in args.split or splits(args.data):
        every.append(examine(args.data, split, **options))
        print(text(every[-1]), end='\n\n')
    if args.html:
        report.write(args.html, every)
        print(f'pictures: {args.html}')
    if any(problem.stops for findings in every for problem in findings.problems):
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main)
