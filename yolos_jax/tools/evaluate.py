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
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from yolos_jax import attention, bucket, class_matching, evaluation, files, steps, visualize, weights
from yolos_jax.analysis import groups, outcomes, precision
from yolos_jax.analysis.analysis import analyse
from yolos_jax.data import annotations, corruptions, records, sources
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError, shown
from yolos_jax.inference import DTYPES, Detector
from yolos_jax.patches import PATCH
from yolos_jax.progress_bar import progress_bar
from yolos_jax.run import cli, cluster, run_files, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.tools import flags, report
from yolos_jax.tools.prediction_files import EVALUATION, LINES, LIST
from yolos_jax.weights import checkpoint, integrity
from yolos_jax.weights.pretrained import about_ids

NUMBERED = r'LABEL_\d+|class \d+'  # names of classes in files that have none


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
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


def make_detect(
    dtype: str, pretrained: weights.Pretrained, batches: dict, mesh: Mesh
) -> Callable[..., dict]:
    """A function that returns the detections in the batches, optionally with altered images."""
    dtype = jnp.dtype(dtype)
    kernel = attention.for_platform(meshes.platform(mesh), dtype)
    step = steps.make_predict_step(pretrained.model.clone(dtype=dtype, attention_kernel=kernel))
    predict = functools.partial(
        meshes.make_predictor(step, mesh), meshes.replicate(pretrained.params, mesh)
    )
    rows, threads = meshes.rows_of_process(batches['batch_size'], mesh), cluster.threads()

    def detect(name: str = '', alter: Callable | None = None) -> dict:
        altered = EvalBatches(**batches, alter=alter)
        options = dict(desc=name, unit='batch', leave=not name, disable=not cluster.is_first())
        with progress_bar(total=len(altered), **options) as bar:
            options = dict(rows=rows, gather=cluster.gather, on_batch=bar.update, threads=threads)
            return evaluation.detect(predict, altered, **options)

    return detect


def evaluate(
    detector: str | Path | Detector | weights.Pretrained,
    data: str | Path | records.Records,
    split: str = 'val2017',
    *,
    batch_size: int | None = None,
    dtype: str = 'float32',
    log: Callable[[str], None] = print,
) -> dict:
    """COCO's twelve numbers of a detector on a split of a data set, and the AP of each class.

    detector: what `weights.read` takes or returns, or a `Detector`. data: what `records.read` takes (then
        with split) or returns. batch_size: images per step; None: one per device. dtype: of the
        activations. log: called with each note on the data.

    Returns:
        {'AP': ..., 'AP50': ..., ...} and, under 'classes', {name: AP}; -1 if there is no object.

    Raises:
        InputError: the detector or the data cannot be read, or have no class in common.
    """
    if dtype not in DTYPES:
        raise InputError(f'dtype is {dtype!r}, not {" or ".join(map(repr, DTYPES))}', 'dtype')
    pretrained = detector.pretrained if isinstance(detector, Detector) else detector
    if not isinstance(pretrained, weights.Pretrained):
        pretrained = weights.read(pretrained)
    data = data if isinstance(data, records.Records) else records.read(data, split)
    category_of, notes = class_matching.match(pretrained, data)
    for note in [*notes, *data.notes]:
        log(f'note: {note}')
    mesh = meshes.make_mesh()
    batch_size = mesh.size if batch_size is None else batch_size
    meshes.check_divides(batch_size, mesh)
    size, max_size = pretrained.size, pretrained.max_size
    batches = dict(records=data, size=size, max_size=max_size, batch_size=batch_size)
    results = evaluation.to_results(make_detect(dtype, pretrained, batches, mesh)(), data, category_of)
    numbers, classes = evaluation.score(data.truth(), results)
    return numbers | {'classes': classes}


def write_evaluation(args: argparse.Namespace, output: Path) -> None:
    """Detect, score and write to the output folder."""
    if (output / LINES).exists():
        raise InputError(f'{output}: holds predictions, of which {LIST} would be replaced', 'output')
    mesh = meshes.make_mesh()
    batch_size = mesh.size if args.batch_size is None else args.batch_size
    meshes.check_divides(batch_size, mesh)
    data = read_data(args)
    pretrained, category_of = read_detector(args, data)
    size = pretrained.size if args.size is None else args.size
    bound = pretrained.max_size * size // pretrained.size  # in the same proportion
    max_size = bound if args.max_size is None else args.max_size
    for name, side in (('size', size), ('max_size', max_size)):
        if side < PATCH:
            raise InputError(f'{name} is {side}, less than a patch of {PATCH} pixels', name)
    batches = dict(records=data, size=size, max_size=max_size, batch_size=batch_size)
    if not cluster.is_alone():
        agree(args, batches, pretrained)
    truth = data.truth()
    # both raise before any work is done
    fields = groups.read_fields(data, truth, args.by)
    visualize.load_font(args.font, 13)
    detect = make_detect(args.dtype, pretrained, batches, mesh)
    results = evaluation.to_results(detect(), data, category_of)
    corrupted = corruptions_of(detect, data, truth, category_of) if args.corruptions else None
    if not cluster.is_first():
        return
    numbers, classes = evaluation.score(truth, results)

    about = {
        'weights': args.weights,
        'data': str(data.source.path),
        'dataset': dataset_name(args.data or args.images or os.path.dirname(args.json) or '.'),
        'split': data.source.split,
        'size': [size, max_size],
        'dtype': args.dtype,
        'fingerprint': integrity.fingerprint(pretrained.params),
    }
    about |= {key: pretrained.about[key] for key in ('step', 'sha256') if key in pretrained.about}
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


def dataset_name(folder: str) -> str:
    """The name of a data folder, given it, its URL, or the data.yaml in it."""
    path = Path(folder) if bucket.is_url(folder) else Path(folder).resolve()
    return path.parent.name if path.is_file() else path.name


def agree(args: argparse.Namespace, batches: dict, pretrained: weights.Pretrained) -> None:
    """Raises InputError if the processes of an evaluation differ in options, data, weights or software."""
    cluster.agree(
        {
            'the size of the images': (batches['size'], batches['max_size']),
            'batch_size': batches['batch_size'],
            'dtype': args.dtype,
            'corruptions': args.corruptions,
            'the data': batches['records'].digests,
            'the detector': checkpoint.describe(pretrained)['model'],
            'the weights': integrity.checksums(pretrained.params),
        }
        | cluster.facts_of_code()
    )


def corruptions_of(
    detect: Callable[..., dict],
    data: records.Records,
    truth: annotations.Annotations,
    category_of: dict[int, int],
) -> dict[str, list[float]]:
    """The AP under each corruption at each strength."""
    result = {}
    for name in corruptions.CORRUPTIONS:
        values = []
        for strength in corruptions.STRENGTHS:
            alter = lambda image, number, n=name, s=strength: corruptions.corrupt(image, n, s, number)
            results = evaluation.to_results(detect(f'{name} {strength}', alter), data, category_of)
            split = outcomes.columns(truth, results)
            values.append(precision.curves(outcomes.match(split)).ap())
        result[name] = values
    return result


if __name__ == '__main__':
    cli.run(main)
