"""Evaluate a detector on a COCO folder.

    python eval.py --weights=PATH --data=COCO_FOLDER --output=DIR

Prints COCO's twelve numbers and the AP of each class, and writes metrics.json and predictions.json (COCO
results) to the output folder.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
from tqdm import tqdm

from yolos_jax import adapt, cli, cluster, evaluation, files, sharding, steps, weights
from yolos_jax.data import loader, records


def main():
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--weights', required=True, help='a workdir, checkpoint, Hugging Face folder or .pth'
    )
    parser.add_argument('--data', required=True, help='a COCO folder')
    parser.add_argument('--output', required=True, type=Path, help='a folder for the results')
    parser.add_argument('--split', default='val2017', help='its JSON and image folder (val2017)')
    parser.add_argument('--batch_size', type=int, help='images per step (one per device)')
    parser.add_argument('--size', type=int, help='shorter side in pixels (what the weights say)')
    parser.add_argument('--max_size', type=int, help='bound of the longer side (what the weights say)')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    cluster.add_arguments(parser)
    args = parser.parse_args()

    cluster.start(args.coordinator, args.num_processes, args.process_id, args.heartbeat)
    mesh = sharding.make_mesh()
    batch_size = mesh.size if args.batch_size is None else args.batch_size
    sharding.check_divides(batch_size, mesh, '--batch_size')
    data = records.read(args.data, args.split)
    found = weights.read(args.weights)
    adapt.check_classes(found, data.classes, data.json)
    size, max_size = args.size or found.size, args.max_size or found.max_size
    batches = loader.EvalBatches(data, size, max_size, batch_size)

    predict = steps.make_predict_step(found.model.clone(dtype=jnp.dtype(args.dtype)))
    params = sharding.replicate(found.params, mesh)
    with tqdm(total=len(batches), unit='batch', disable=not cluster.is_first()) as bar:
        results = evaluation.detect(predict, params, batches, mesh, bar.update)
    if not cluster.is_first():
        return
    numbers, classes = evaluation.score(data.json, results)

    print(evaluation.table(numbers))
    for name, ap in sorted(classes.items(), key=lambda item: -item[1]):
        print(f'{ap:8.3f} {name}')
    args.output.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output / 'metrics.json', numbers | {'classes': classes})
    files.write_json(args.output / 'predictions.json', results)


if __name__ == '__main__':
    cli.run(main)
