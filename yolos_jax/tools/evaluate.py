"""Evaluate a detector on a data set.

    yolos eval --weights=PATH --data=FOLDER --output=DIR

Prints COCO's twelve numbers and the AP of each class, and writes metrics.json and predictions.json (COCO
results) to the output folder; with --report also report.html: errors by kind, AP by groups, pictures.
"""

import argparse
import dataclasses
import functools
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from yolos_jax import bucket, class_matching, evaluation, files, visualize, weights
from yolos_jax.analysis import groups, outcomes
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data import annotations, records, sources
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError, shown
from yolos_jax.inference import DTYPES
from yolos_jax.patches import PATCH
from yolos_jax.run import cli, cluster, run_files, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.evaluate import batch_size_on, corruptions_of, make_detect
from yolos_jax.tools import flags, report
from yolos_jax.tools.prediction_files import EVALUATION, LINES, LIST
from yolos_jax.weights import checkpoint, integrity
from yolos_jax.weights.pretrained import about_ids

NUMBERED = r'LABEL_\d+|class \d+'  # names of classes in files that have none


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = flags.parser(__doc__)
    hints = flags.add_weights(parser)
    parser.add_argument('--data', help='a data folder, or its URL in a bucket')
    parser.add_argument('--json', help='a COCO file, in place of --data')
    parser.add_argument('--images', help='with --json: the folder of its images (the folder of the file)')
    parser.add_argument('--output', required=True, help='a folder, or URL in a bucket, for the results')
    parser.add_argument('--split', help='name of the split in --data (val2017; or val, valid, validation)')
    parser.add_argument('--batch_size', type=int, help='images per step (one per device)')
    parser.add_argument('--size', type=int, help='shorter side in pixels (default: from the weights)')
    parser.add_argument('--max_size', type=int, help='bound of the longer side (in proportion to --size)')
    parser.add_argument('--dtype', default='float32', choices=DTYPES)
    parser.add_argument('--report', action='store_true', help='write report.html as well')
    parser.add_argument(
        '--by', action='append', default=[], metavar='images.FIELD',
        help='AP of groups in the report, by a field of images or annotations.FIELD in the COCO file',
    )  # fmt: skip
    parser.add_argument(
        '--corruptions', action='store_true', help='evaluate under 24 corruptions, for the report'
    )
    flags.add_font(parser)
    hints.add_argument('--classes', metavar='JSON', help='a COCO annotation file with its class names')
    flags.add_cluster(parser)
    return parser.parse_args(arguments)


@cli.without_flags('bad_images')  # a key that only a run has
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and evaluate."""
    args = parse(arguments)
    cluster.start(args.coordinator, args.num_processes, args.process_id, args.heartbeat)
    if not cluster.is_alone():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX only notes it, for runs that save at a step
    with workdir.opened(args.output, removes=True) as work:  # one evaluation at a time
        write_evaluation(args, work.folder)


def read_data(args: argparse.Namespace) -> records.Records:
    """The images to evaluate on."""
    if args.json and args.data:
        raise InputError('data and json are both given; the images of json are in --images', 'data')
    if args.json and args.split:
        raise InputError(f'split is {args.split}, which has no effect with json', 'split')
    if args.json:
        return records.from_source(sources.of_files(args.json, args.images))
    if not args.data:
        raise InputError('no data: name a folder', 'data')
    if args.images:
        raise InputError(f'images is {args.images}, which has no effect without json', 'images')
    try:
        return records.read(args.data, args.split or 'val2017')
    except InputError as error:
        own = Path(args.weights) / run_files.TRUTH
        if error.argument != 'split' or not own.is_file():
            raise
        raise InputError(
            f'{error}; the run was evaluated on a part of its images: --json={own} --images={args.data}',
            'split',
        ) from None


def read_detector(
    args: argparse.Namespace, data: records.Records
) -> tuple[weights.Pretrained, dict[int, int]]:
    """The detector, and the category id in the data of each of its labels; prints notes on both."""
    pretrained = weights.read(args.weights, args.step, log=print, **flags.hints(args))
    is_named = not all(re.fullmatch(NUMBERED, name) for name in pretrained.classes.values())
    if args.classes:
        if is_named:
            print(f'note: {args.classes} replaces the class names {shown(pretrained.classes.values())}')
        pretrained = with_names(pretrained, args.classes)
    try:
        category_of, notes = class_matching.match(pretrained, data)
    except InputError as error:
        raise InputError(str(error), None if is_named else 'classes') from None
    for note in [*notes, *data.notes]:
        print(f'note: {note}')
    return pretrained, category_of


def with_names(pretrained: weights.Pretrained, file: str) -> weights.Pretrained:
    """The detector with the class names of a COCO file; raises InputError if it has fewer classes."""
    classes, ids = records.numbered(annotations.read_classes(file))
    if (last := max(classes)) >= pretrained.model.num_classes:
        raise InputError(
            f'{file}: has a class {last}, and the model {pretrained.model.num_classes} classes', 'classes'
        )
    return dataclasses.replace(pretrained, classes=classes, about=pretrained.about | about_ids(ids))


def write_evaluation(args: argparse.Namespace, output: Path) -> None:
    """Detect, score and write to the output folder."""
    if (output / LINES).exists():
        raise InputError(f'{output}: holds predictions, of which {LIST} would be replaced', 'output')
    mesh = meshes.make_mesh()
    batch_size = batch_size_on(mesh, args.batch_size)
    data = read_data(args)
    pretrained, category_of = read_detector(args, data)
    size, max_size = image_size(args, pretrained)
    if not cluster.is_alone():
        agree(args, data, pretrained, size=(size, max_size), batch_size=batch_size)
    truth = data.truth()
    # both raise before any work is done
    fields = groups.read_fields(data, truth, args.by)
    visualize.load_font(args.font, 13)
    detect = make_detect(pretrained, mesh, dtype=args.dtype, batch_size=batch_size)
    batches = functools.partial(EvalBatches, data, size=size, max_size=max_size, batch_size=batch_size)
    results = evaluation.to_results(detect(batches()), data, category_of)
    corrupted = corruptions_of(detect, batches, truth, category_of) if args.corruptions else None
    if not cluster.is_first():
        return
    numbers, classes = evaluation.score(truth, results)
    about = about_evaluation(args, data, pretrained, [size, max_size])
    files.write_json(output / LIST, results)
    for name in (EVALUATION, *report.FILES):  # those of an earlier evaluation, of other predictions
        (output / name).unlink(missing_ok=True)
    files.write_json(output / EVALUATION, numbers | {'classes': classes, 'about': about})
    print(evaluation.table(numbers))
    for name, ap in sorted(classes.items(), key=lambda item: -item[1]):
        print(f'{ap:8.3f} {name}')
    if args.report or args.by or args.corruptions:
        split = outcomes.columns(truth, results)
        analysis = analyse(split, fields, corrupted)
        texts = {name: str(value) for name, value in about.items()}
        report.write(output, analysis, data, numbers, texts, args.font)
        print(f'report: {args.output}/report.html')


def image_size(args: argparse.Namespace, pretrained: weights.Pretrained) -> tuple[int, int]:
    """The shorter side that images are resized to, and the bound of the longer."""
    size = pretrained.size if args.size is None else args.size
    bound = pretrained.max_size * size // pretrained.size  # in the same proportion
    max_size = bound if args.max_size is None else args.max_size
    for name, side in (('size', size), ('max_size', max_size)):
        if side < PATCH:
            raise InputError(f'{name} is {side}, less than a patch of {PATCH} pixels', name)
    return size, max_size


def about_evaluation(
    args: argparse.Namespace, data: records.Records, pretrained: weights.Pretrained, size: list[int]
) -> dict:
    """What was evaluated on what, for metrics.json and the report."""
    about = {
        'weights': args.weights,
        'data': str(data.source.path),
        'dataset': dataset_name(args.data or args.images or os.path.dirname(args.json) or '.'),
        'split': data.source.split,
        'size': size,
        'dtype': args.dtype,
        'fingerprint': integrity.fingerprint(pretrained.params),
    }
    return about | {key: pretrained.about[key] for key in ('step', 'sha256') if key in pretrained.about}


def dataset_name(folder: str) -> str:
    """The name of a data folder, given it, its URL, or the data.yaml in it."""
    path = Path(folder) if bucket.is_url(folder) else Path(folder).resolve()
    return path.parent.name if path.is_file() else path.name


def agree(
    args: argparse.Namespace,
    data: records.Records,
    pretrained: weights.Pretrained,
    *,
    size: tuple[int, int],
    batch_size: int,
) -> None:
    """Raises InputError if the processes of an evaluation differ in options, data, weights or software."""
    cluster.agree(
        {
            'the size of the images': size,
            'batch_size': batch_size,
            'dtype': args.dtype,
            'corruptions': args.corruptions,
            'the data': data.digests,
            'the detector': checkpoint.describe(pretrained)['model'],
            'the weights': integrity.checksums(pretrained.params),
        }
        | cluster.facts_of_code()
    )


if __name__ == '__main__':
    cli.run(main)
