"""Check this implementation with the published weights: golden values, and AP if COCO is given.

    yolos verify [--data=COCO] [--image=FILE] [--output=DIR] [NAME ...]

compares logits, boxes, scores and labels of hustvl/yolos-small for an image with those that the test of
transformers expects and, with --data, the AP of each published detector with the paper's. They are
downloaded unless a folder has their name. The results are kept in the output folder, so that the same
command resumes. The exit status is 1 if something differs.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

import yolos_jax
from yolos_jax import files, weights
from yolos_jax.data import geometry
from yolos_jax.errors import InputError
from yolos_jax.run import cli
from yolos_jax.tools import evaluate, flags
from yolos_jax.tools.prediction_files import EVALUATION
from yolos_jax.weights import zoo

IMAGE = 'val2017/000000039769.jpg'
# of 100: the paper's AP has one decimal, and other libraries decode JPEG a little differently
AP_TOLERANCE = 0.1


class Golden(NamedTuple):
    """The values that transformers' test of a detector expects for the image.

    logits, boxes: the first three columns of the first three [DET] tokens, boxes as cxcywh in 0..1. scores,
    labels: of the tokens above 0.3, in their order; box: of the first of these, xyxy in pixels.
    """

    logits: tuple[tuple[float, ...], ...]
    boxes: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...]
    box: tuple[float, ...]


# a JPEG decoded otherwise changes pixels by one and logits by 0.01; another resize changes them by 0.3
TOLERANCES = {'logits': 0.02, 'boxes': 1e-3, 'scores': 1e-3, 'labels': 0, 'box': 0.5}
GOLDEN = {
    'hustvl/yolos-small': Golden(
        ((-23.7219, -10.3165, -14.9083), (-41.5429, -15.2403, -24.1478), (-29.3909, -12.7173, -19.4650)),
        ((0.2536, 0.5449, 0.4643), (0.2037, 0.7735, 0.3672), (0.7692, 0.4056, 0.4549)),
        (0.9991, 0.9801, 0.9978, 0.9875, 0.9848),
        (75, 75, 17, 63, 17),
        (331.8438, 80.5440, 369.9546, 188.0579),
    )
}


def measure(detector: weights.Pretrained, image: Image.Image) -> Golden:
    """The values of the detector for an image, resized by Pillow as in the test."""
    height, width = geometry.resize_shape(image.height, image.width, detector.size, detector.max_size)
    resized = image.convert('RGB').resize((width, height), Image.BILINEAR)
    patches, grid = yolos_jax.patchify([np.asarray(resized)])
    outputs = jax.jit(detector.model.apply)({'params': detector.params}, patches, grid)
    logits, boxes = (np.asarray(outputs[name][0], np.float64) for name in ('pred_logits', 'pred_boxes'))
    scores = np.asarray(jax.nn.softmax(logits, axis=-1))[:, :-1]
    tokens = np.flatnonzero(scores.max(axis=1) > 0.3)
    x, y, w, h = boxes[tokens[0] if len(tokens) else 0]
    corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * np.tile(image.size, 2)
    return Golden(
        logits[:3, :3].tolist(),
        boxes[:3, :3].tolist(),
        scores[tokens].max(axis=1).tolist(),
        scores[tokens].argmax(axis=1).tolist(),
        corners.tolist(),
    )


def check_golden(name: str, golden: Golden, path: Path) -> dict:
    """Published beside measured values of an image, and whether they are the same."""
    with Image.open(path) as image:
        measured = measure(weights.read(name, log=print), image)
    rows = {what: [getattr(golden, what), getattr(measured, what)] for what in TOLERANCES}
    same = all(
        np.shape(expected) == np.shape(actual)
        and np.allclose(actual, expected, atol=TOLERANCES[what], rtol=0)
        for what, (expected, actual) in rows.items()
    )
    return {'published, measured': rows, 'same': same}


def check_ap(name: str, published: float, data: str, output: Path, size: int) -> dict:
    """Published beside measured AP (of 100) at a shorter side, and whether they are the same.

    The longer side is bounded in proportion, as in the original; the file beside YOLOS-Ti says 1333.
    """
    place = f'--weights={name}', f'--data={data}', f'--output={output}'
    evaluate.main([*place, f'--size={size}', f'--max_size={size * 1333 // 800}', '--num_processes=1'])
    ap = 100 * files.read_json(output / EVALUATION)['AP']
    return {
        'published, measured': {'AP': [published, round(ap, 2)]},
        'same': abs(ap - published) <= AP_TOLERANCE,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and verify."""
    parser = flags.parser(__doc__)
    parser.add_argument('--data', help='COCO: annotations/instances_val2017.json and val2017/')
    parser.add_argument('--image', type=Path, help=f'the image, if there is no COCO ({IMAGE})')
    parser.add_argument('--output', type=Path, default=Path('verified'), help='a folder (verified)')
    parser.add_argument('names', nargs='*', help='repositories (all)')
    args = parser.parse_args(arguments)
    files.check_folder(args.output)
    image = args.image or args.data and Path(args.data) / IMAGE
    if unknown := set(args.names) - zoo.DETECTORS.keys():
        raise InputError(f'{sorted(unknown)[0]}: not one of {", ".join(zoo.DETECTORS)}')
    if not image:
        raise InputError(f'no data: name the COCO folder, or its image {IMAGE}', 'data')
    jobs = {f'{name} values': (check_golden, name, golden, image) for name, golden in GOLDEN.items()}
    if args.data:
        for name, (ap, size) in zoo.DETECTORS.items():
            folder = args.output / name.replace('/', '_')
            jobs[f'{name} AP'] = check_ap, name, ap, args.data, folder, size
    jobs = {name: job for name, job in jobs.items() if not args.names or job[1] in args.names}
    if not jobs:
        raise InputError(f'{", ".join(args.names)}: only the AP is published, which needs COCO', 'data')
    if not image.is_file():
        raise InputError(f'{image}: no such file', 'image' if args.image else 'data')
    if verify(jobs, args.output):
        sys.exit(1)


def verify(jobs: dict[str, tuple], output: Path) -> list[str]:
    """Run the checks that are not done yet, print all results, and return the names of failed ones.

    jobs: {name: (check, model, published, image or data, *further arguments of the check)}.
    """
    path = output / 'verified.json'
    done = files.read_json(path) if path.exists() else {}
    for name, (check, model, published, place, *others) in jobs.items():
        place_name = os.path.abspath(place)
        is_done = done.get(name, {}).get('of') == place_name
        if not is_done:
            done[name] = check(model, published, place, *others) | {'of': place_name}
            files.write_json(path, done)
        verdict = 'the same' if done[name]['same'] else 'DIFFERENT'
        print(f'{name}: {verdict}' + f' (measured earlier; without {path} it is measured again)' * is_done)
        for what, (expected, measured) in done[name]['published, measured'].items():
            print(f'  {what}: published {expected}, measured {measured}')
    return [name for name in jobs if not done[name]['same']]


if __name__ == '__main__':
    cli.run(main)
