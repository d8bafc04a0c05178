"""Check this implementation with the published weights: golden values, and AP where COCO is at hand.

    yolos verify [--data=COCO] [--output=DIR] [NAME ...]

fetches each published detector (a folder of that name wins), compares logits and labels of an image with
those that the test of transformers expects, and with --data the AP with the paper's. What was measured is
kept in the output folder, so that the same command continues. The exit status is 1 where something
differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

import yolos_jax
from yolos_jax import files, weights
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH
from yolos_jax.run import cli
from yolos_jax.tools import evaluate
from yolos_jax.weights import zoo

IMAGE = 'val2017/000000039769.jpg'
# of 100: the paper's AP has one decimal, and other libraries decode JPEG a little differently
AP_TOLERANCE = 0.1


class Golden(NamedTuple):
    """What transformers' test of a detector expects on the image, under its own preprocessing.

    logits: the first three classes of the first [DET] token; labels: those above 0.3, best first.
    """

    logits: tuple[float, ...]
    labels: tuple[int, ...]
    tolerance: float = 1e-3


GOLDEN = {'hustvl/yolos-small': Golden((-23.7219, -10.3165, -14.9083), (75, 75, 17, 63, 17))}


def logits_of(detector: weights.Pretrained, image: Image.Image) -> np.ndarray:
    """Logits [Q, C + 1] under transformers' preprocessing, which rounds no side to whole patches."""
    short, size = min(image.size), detector.size
    width, height = (int(size * side / short) for side in image.size)
    pixels = np.asarray(image.convert('RGB').resize((width, height), Image.BILINEAR))
    pixels = pixels[: height // PATCH * PATCH, : width // PATCH * PATCH]
    patches, grid = yolos_jax.patchify([pixels])
    outputs = jax.jit(detector.model.apply)({'params': detector.params}, patches, grid)
    return np.asarray(outputs['pred_logits'][0])


def check_golden(name: str, golden: Golden, path: Path) -> dict:
    """Published beside measured values of an image, and whether they are the same."""
    detector = weights.read(name, log=print)
    with Image.open(path) as image:
        logits = logits_of(detector, image)
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]
    best = np.asarray(scores.max(axis=1))
    order = [i for i in np.argsort(-best, kind='stable') if best[i] > 0.3]
    measured = logits[0, : len(golden.logits)].tolist()
    labels = np.asarray(scores.argmax(axis=1))[order].tolist()
    same = np.allclose(measured, golden.logits, atol=golden.tolerance, rtol=0) and labels == [
        *golden.labels
    ]
    rows = {'logits': [golden.logits, measured], 'labels': [golden.labels, labels]}
    return {'published, measured': rows, 'same': bool(same)}


def check_ap(name: str, published: float, data: str, output: Path) -> dict:
    """Published beside measured AP (of 100), and whether they are the same."""
    evaluate.main([f'--weights={name}', f'--data={data}', f'--output={output}', '--num_processes=1'])
    ap = 100 * json.loads((output / 'metrics.json').read_text())['AP']
    return {
        'published, measured': {'AP': [published, round(ap, 2)]},
        'same': abs(ap - published) <= AP_TOLERANCE,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and verify."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', help='COCO: annotations/instances_val2017.json and val2017/')
    parser.add_argument('--image', type=Path, help=f'the image, where there is no COCO ({IMAGE})')
    parser.add_argument('--output', type=Path, default=Path('verified'), help='a folder (verified)')
    parser.add_argument('names', nargs='*', help='repositories (all)')
    args = parser.parse_args(arguments)
    image = args.image or args.data and Path(args.data) / IMAGE
    if not image:
        raise InputError(f'neither COCO nor its image {IMAGE} is given', 'data')
    published = {detector.repository: detector.ap for detector in zoo.DETECTORS.values()}
    jobs = {f'{name} values': (check_golden, name, golden, image) for name, golden in GOLDEN.items()}
    if args.data:
        for name, ap in published.items():
            jobs[f'{name} AP'] = check_ap, name, ap, args.data, args.output / name.replace('/', '_')
    known = [*published, *GOLDEN]
    if unknown := set(args.names) - {*known}:
        raise InputError(f'{sorted(unknown)[0]}: not one of {", ".join(known)}', 'names')
    jobs = {name: job for name, job in jobs.items() if not args.names or job[1] in args.names}
    if not jobs:
        raise InputError(f'{", ".join(args.names)}: only the AP is published, which needs COCO', 'data')
    if verify(jobs, args.output):
        sys.exit(1)


def verify(jobs: dict[str, tuple], output: Path) -> list[str]:
    """Do what is not done yet, print each result, and return the names of those that differ."""
    path = output / 'verified.json'
    done = json.loads(path.read_text()) if path.exists() else {}
    for name, (check, *arguments) in jobs.items():
        if name not in done:
            done[name] = check(*arguments)
            files.write_json(path, done)
        verdict = 'the same' if done[name]['same'] else 'DIFFERENT'
        print(f'{name}: {verdict}')
        for what, (expected, measured) in done[name]['published, measured'].items():
            print(f'  {what}: published {expected}, measured {measured}')
    return [name for name in jobs if not done[name]['same']]


if __name__ == '__main__':
    cli.run(main)
