"""Check a data set before training on it.

    yolos check DIR [--split NAME ...] [--html=FILE] [--config=yolos_ti]

reads every annotation and decodes every image of a data set as `yolos train` takes it, and prints what is
wrong, what training leaves out, the classes, the sizes, and how much padding the config's recipe would have
(YOLOS-S's without one). --html adds pictures: the worst images, and a batch as the model sees it. The exit
status is 1 if an annotation, an image or too few images would stop a run.
"""

import collections
import concurrent.futures
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from yolos_jax import cpus, files, visualize
from yolos_jax.data import geometry, overlap, pixels, records, sources
from yolos_jax.data.annotations import LARGE, SMALL, Annotations, tolerated
from yolos_jax.data.batches import TrainBatches
from yolos_jax.data.problems import Problem, find_problems
from yolos_jax.errors import InputError, StorageError
from yolos_jax.progress_bar import progress_bar
from yolos_jax.run import cli, config_files
from yolos_jax.tools import data_page, flags
from yolos_jax.tools.data_page import Findings

RECIPE = geometry.Recipe.published()
MAX_TARGETS = 100  # of an image, as many as the [DET] tokens of the published models
OPTIONS = {'num_lengths': 8, 'batch_size': 8, 'max_targets': MAX_TARGETS, 'special': 1 + MAX_TARGETS}
TURNED = 'turned by EXIF'


def examine(
    root: str | Path,
    split: str,
    recipe: geometry.Recipe = RECIPE,
    *,
    trains: bool = False,
    bad_images: int | None = None,
    **options: int,
) -> Findings:
    """Examine a split: its problems, tables of its content, and batches of it.

    trains: whether a run would train on it. bad_images: as for `records.from_source`. options: of
    `TrainBatches.make`; given ones are those of a run.
    """
    given, options = options, OPTIONS | options
    source = sources.find(root, split)
    try:
        a = source.load()
        problems = find_problems(a)
        if any(problem.stops for problem in problems):
            return Findings(split, problems, annotations=a)
        images, names = source.images(a.files)
    except StorageError:
        raise
    except InputError as error:  # only of this split: the others are examined all the same
        return Findings(split, [Problem(str(error), 0, [], True)])
    problems += [Problem(note, 0, [], False) for note in a.notes]
    a = dataclasses.replace(a, files=names)
    most_bad = tolerated(len(a.ids)) if bad_images is None else bad_images
    of_images, bad = check_images(images, a, most_bad)
    problems += of_images
    data = records.Records(**records.flatten(a), images=images, source=source, bad_images=len(a.ids))
    problems += of_training(data, options, trains=trains, of_run='batch_size' in given)
    problems.sort(key=lambda problem: not problem.stops)
    described, batches = tables(data), None
    if len(data) >= options['batch_size']:
        batches = TrainBatches.make(data, recipe, seed=0, **options)
        lengths, waste = batches.waste()
        rows = [('lengths', ' '.join(map(str, lengths))), ('padding', f'{waste:.1%}')]
        described.append(('Sequences, in patches', rows))
    return Findings(split, problems, described, data, batches, a, images, bad)


def check_images(images: object, a: Annotations, most_bad: int) -> tuple[list[Problem], dict]:
    """Decode every image of `Annotations`: a list of `Problem`, and {kind: indices of images}.

    most_bad: how many may be unreadable, or of another size, in a run.
    """
    missing = set(images.missing(a.files))
    bad_images, texts = collections.defaultdict(list), collections.defaultdict(list)
    with concurrent.futures.ThreadPoolExecutor(cpus.usable()) as pool:
        jobs = pool.map(lambda i: _look(images, a, i, missing), range(len(a.ids)))
        for i, (kind, text) in enumerate(progress_bar(jobs, total=len(a.ids), unit='image', leave=False)):
            if kind:
                bad_images[kind].append(i)
                texts[kind].append(text)
    bad = sum(len(where) for kind, where in bad_images.items() if not kind.startswith(TURNED))
    too_many = bad > most_bad
    stops = lambda kind: kind == 'missing' or too_many and not kind.startswith(TURNED)
    problems = [Problem(f'images {kind}', len(x), x[:5], stops(kind)) for kind, x in texts.items()]
    return problems, bad_images


def _look(images: object, a: Annotations, i: int, missing: set) -> tuple[str | None, str]:
    """What is wrong with an image, if anything, and its name with the details."""
    name, annotated = images.name(a.files[i]), (a.heights[i], a.widths[i])
    if a.files[i] in missing:
        return 'missing', name
    try:
        data = images.start_read(a.files[i], i)()
        height, width, _ = pixels.decode(data, name, images.upright).shape
    except StorageError:
        raise  # not the fault of the image
    except InputError as error:
        return 'unreadable', str(error)
    turned = pixels.orientation(data)
    if (height, width) == annotated:
        if turned == 1:
            return None, name
        if not images.upright and (turned < 5 or height == width):
            return f'{TURNED}, used as stored: their sizes do not say how boxes lie on them', name
        return f'{TURNED}, annotated and used {"upright" if images.upright else "as stored"}', name
    if not images.upright and turned > 4 and (width, height) == annotated:
        return f'{TURNED}, annotated and used upright', name
    sizes = f'{width} x {height}, annotated {annotated[1]} x {annotated[0]}'
    return 'of another size than annotated', f'{name} is {sizes}'


def of_training(data: records.Records, options: dict, *, trains: bool, of_run: bool) -> list[Problem]:
    """The problems of a split with too few or too many images or objects.

    options: of `TrainBatches.make`. trains: whether a run would train on it. of_run: whether the batch size
    is that of a run, and not the default.
    """
    problems, batch_size, most = [], options['batch_size'], options['max_targets']
    if not len(data.boxes):
        problems.append(Problem(data.why_no_objects, 0, [], trains))
    if len(data) < batch_size and trains:
        what = f'{len(data)} images are less than one batch of {batch_size} (--config.batch_size)'
        problems.append(Problem(what, 0, [], of_run))
    if len(many := np.flatnonzero(np.diff(data.first) > most)):
        what = f'images with more than {most} objects, of which the largest are targets'
        problems.append(Problem(what, len(many), [data.files[i] for i in many[:5]], False))
    return problems


def tables(r: records.Records) -> list:
    """Tables of the content of `Records`: [(title, [(name, value), ...]), ...]."""
    counts, areas = np.diff(r.first), (r.boxes[:, 2:] - r.boxes[:, :2]).prod(axis=1)
    part = lambda where: f'{where.sum():,} ({where.mean():.1%})' if len(where) else '0'
    shapes = collections.Counter(zip(r.widths.tolist(), r.heights.tolist(), strict=True))
    image = np.repeat(np.arange(len(r)), counts)
    objects = np.bincount(r.labels, minlength=r.num_classes)
    images = np.bincount(np.unique(np.stack([image, r.labels]), axis=1)[1], minlength=r.num_classes)
    of_images = [
        ('in all', f'{len(r):,}'),
        ('without objects', part(counts == 0)),
        ('objects in one', f'{counts.mean():.1f} on average, {counts.max()} at most'),
    ]
    of_sizes = [(f'{w} x {h}', f'{n:,} ({n / len(r):.1%})') for (w, h), n in shapes.most_common(8)]
    of_objects = [
        ('to train on', f'{len(r.boxes):,}'),
        ('crowds, left out', f'{r.dropped["crowd"]:,}'),
        ('without an area, left out', f'{r.dropped["no area"]:,}'),
        ('small, below 32 x 32', part(areas < SMALL)),
        ('medium', part((areas >= SMALL) & (areas < LARGE))),
        ('large, from 96 x 96', part(areas >= LARGE)),
    ]
    in_class = lambda c: f'{objects[c]:,} in {images[c]:,} images'
    of_classes = [(f'{c} {name}', in_class(c)) for c, name in sorted(r.classes.items())]
    title = f'Sizes, the commonest of {len(shapes)}'
    return [('Images', of_images), (title, of_sizes), ('Objects', of_objects), ('Classes', of_classes)]


def chosen(split: str, splits: Sequence[str], root: str) -> str | None:
    """The split that training would take for this name; None if there is none."""
    try:
        return sources.choose(split, splits, root)
    except InputError:
        return None


def text(findings: Findings) -> str:
    """`Findings` for the terminal."""
    lines = [f'== {findings.split} ==']
    for problem in findings.problems:
        lines.append(f'{"STOPS A RUN" if problem.stops else "note"}: {problem}')
    for title, rows in findings.tables:
        lines += ['', title, *(f'  {name:<30} {value}' for name, value in rows)]
    return '\n'.join(lines)


def run_options(config: ConfigDict, name: str) -> dict:
    """The options of `examine` for a run of a config; raises InputError if it is not a detector's."""
    if config_files.is_pretraining(config):
        raise InputError(f'{name}: a config for pre-training, which has no boxes', 'config')
    tokens = config.model.num_det_tokens or MAX_TARGETS  # 0: those of the weights
    special = 1 + config.model.registers + tokens
    values = {key: config[key] for key in ('num_lengths', 'batch_size', 'bad_images')}
    values['max_targets'] = min(config.max_targets, tokens)
    return {'recipe': geometry.Recipe.from_fields(config.augment), 'special': special} | values


@cli.without_flags('data')
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and check."""
    parser = flags.parser(__doc__)
    parser.add_argument('data', help='a data folder, or its URL in a bucket')
    parser.add_argument('--split', nargs='*', help='the splits to check, after the folder (all)')
    parser.add_argument('--html', type=Path, help='a file for the report with pictures')
    flags.add_font(parser)
    parser.add_argument('--config', help='the config whose recipe to check with (YOLOS-S)')
    args = parser.parse_args(arguments)
    if args.html:
        files.check_file(args.html, 'html', '.html')
        visualize.load_font(args.font, 13)  # raises before any work is done
    options, train_split, val_split = {}, *(names[0] for names in sources.SYNONYMS)
    if args.config:
        config = config_files.read(args.config)
        options = run_options(config, args.config)
        train_split, val_split = config.train_split, config.val_split
    splits = sources.splits(args.data)
    train, val = (chosen(name, splits, args.data) for name in (train_split, val_split))
    all_findings, data = [], {}
    for split in args.split or splits:
        name = chosen(split, splits, args.data)
        findings = examine(args.data, split, **options, trains=name is not None and name == train)
        all_findings.append(findings)
        data[name] = findings.records
        print(text(findings), end='\n\n')
    notes = overlap.notes(data[train], data[val]) if data.get(train) and data.get(val) else []
    if val is None:
        try:
            sources.find(args.data, val_split)
        except InputError as error:  # a data.yaml may name a folder that is not there
            advice = '--config.val_fraction=0.1 takes a tenth of the other images'
            notes.append(f'no validation split ({error}); {advice}')
    for note in notes:
        print(f'note: {note}')
    if args.html:
        data_page.write(args.html, args.data, all_findings, notes, args.font)
        print(f'pictures: {args.html}')
    if any(problem.stops for findings in all_findings for problem in findings.problems):
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main)
