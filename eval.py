"""Evaluate a detector on a COCO folder.

    python eval.py --weights=PATH --data=COCO_FOLDER --output=DIR

Prints COCO's twelve numbers and the AP of each class, and writes metrics.json and predictions.json (COCO
results) to the output folder.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from yolos_jax import attention, evaluation, files, steps, weights
from yolos_jax.data import annotations, loader, records
from yolos_jax.run import cli, cluster, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.weights import adapt


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--weights', required=True, help=cli.WEIGHTS)
    parser.add_argument('--data', required=True, help='a COCO folder')
    parser.add_argument('--output', required=True, type=Path, help='a folder for the results')
    parser.add_argument('--split', default='val2017', help='its JSON and image folder (val2017)')
    parser.add_argument('--batch_size', type=int, help='images per step (one per device)')
    parser.add_argument('--size', type=int, help='shorter side in pixels (what the weights say)')
    parser.add_argument('--max_size', type=int, help='bound of the longer side (what the weights say)')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    unsaid = parser.add_argument_group('what a .pth of no published model does not say')
    unsaid.add_argument('--heads', type=int)
    unsaid.add_argument('--pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    unsaid.add_argument('--mid_pos_grid', type=int, nargs=2, metavar=('ROWS', 'COLUMNS'))
    unsaid.add_argument('--classes', metavar='JSON', help='a COCO annotation file with its class names')
    cli.add_cluster_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and evaluate."""
    args = parse(arguments)
    cluster.start(args.coordinator, args.num_processes, args.process_id, args.heartbeat)
    with workdir.locked(args.output):  # one evaluation at a time
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Detect, score and write."""
    mesh = meshes.make_mesh()
    batch_size = mesh.size if args.batch_size is None else args.batch_size
    meshes.check_divides(batch_size, mesh)
    data = records.read(args.data, args.split)
    with weights.open(args.weights) as source:
        pretrained = source.detector(args.heads, args.pos_grid, args.mid_pos_grid)
    if args.classes:
        classes = annotations.read_classes(args.classes)
        pretrained = dataclasses.replace(pretrained, classes=classes)
    adapt.check_classes(pretrained, data.classes, data.annotation_file, 'classes')
    size, max_size = args.size or pretrained.size, args.max_size or pretrained.max_size
    batches = loader.EvalBatches(data, size=size, max_size=max_size, batch_size=batch_size)

    dtype = jnp.dtype(args.dtype)
    kernel = attention.for_platform(meshes.platform(mesh), dtype)
    step = steps.make_predict_step(pretrained.model.clone(dtype=dtype, attention_kernel=kernel))
    predict = functools.partial(
        meshes.make_predictor(step, mesh), meshes.replicate(pretrained.params, mesh)
    )
    rows = meshes.rows_of_process(batch_size, mesh)
    with tqdm(total=len(batches), unit='batch', disable=not cluster.is_first()) as bar:
        results = evaluation.detect(predict, batches, rows=rows, gather=cluster.gather, on_batch=bar.update)
    if not cluster.is_first():
        return
    numbers, classes = evaluation.score(data.annotation_file, results)

    print(evaluation.table(numbers))
    for name, ap in sorted(classes.items(), key=lambda item: -item[1]):
        print(f'{ap:8.3f} {name}')
    about = {'weights': args.weights, 'data': args.data, 'split': args.split, 'size': [size, max_size]}
    about |= {key: pretrained.about[key] for key in ('step', 'sha256') if key in pretrained.about}
    files.write_json(args.output / 'metrics.json', numbers | {'classes': classes, 'about': about})
    files.write_json(args.output / 'predictions.json', results)


if __name__ == '__main__':
    cli.run(main)
