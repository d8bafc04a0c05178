"""Speed and size of a detector, as the paper measures them.

    yolos speed --weights=PATH --data=FOLDER --output=DIR [--images=100]

Measures multiply-adds, images per second, parameters and memory on the first images of the validation
split, one at a time. Prints a table, and writes speed.json.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from yolos_jax import Detector, cpus, files
from yolos_jax.data import records
from yolos_jax.data.batches import photograph
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import PATCH_DIM
from yolos_jax.run import cli
from yolos_jax.tools import flags
from yolos_jax.weights import integrity, model_card

PUBLISHED = {  # (width, depth): the paper's GFLOPs, table 6, and at which shorter side
    (192, 12): (18.8, 512),
    (384, 12): (194, 800),
    (330, 14): (172, 784),
    (768, 12): (538, 800),
}
METHOD = (
    'GFLOPs are multiply-adds of patch projection, dense layers and attention products of the model as '
    'published, on the grid of each image by itself. Images per second: one by one, warm, median with the '
    '10th and 90th percentile; of the model alone (patches to boxes on the host) and from file to boxes.'
)


def macs(model: Yolos, grid: Sequence[int]) -> int:
    """Multiply-adds for one image of (rows, columns) patches, of the model as published.

    As in the paper, it counts the patch projection, the dense layers, q k^T, and weights times v.
    """
    N = int(grid[0]) * int(grid[1])
    S = model.special + N
    return N * PATCH_DIM * model.width + model.depth * _block(model, S, S) + _heads(model)


def computed_macs(model: Yolos, length: int) -> int:
    """Multiply-adds that this implementation does for one image in a sequence of `length` patches.

    Padding is included; the last block computes only the rows of the [DET] tokens.
    """
    Q = model.num_det_tokens
    S = model.special + length
    blocks = (model.depth - 1) * _block(model, S, S) + _block(model, Q, S)
    return length * PATCH_DIM * model.width + blocks + _heads(model)


def _block(model: Yolos, queries: int, keys: int) -> int:
    """The multiply-adds of a block with attention from `queries` tokens to `keys` tokens."""
    D = model.width
    projections = queries * D * D + keys * 2 * D * D + queries * D * D
    return projections + 2 * queries * keys * D + queries * 2 * 4 * D * D


def _heads(model: Yolos) -> int:
    D = model.width
    return model.num_det_tokens * (4 * D * D + D * (model.num_classes + 1 + 4))


def measure(detector: Detector, images: Sequence[Callable[[], np.ndarray]]) -> dict:
    """The speed and size of a detector as plain numbers; images: functions that each read one, RGB."""
    model, arrays, inputs = detector.model, jax.tree.leaves(detector.params), []
    for read in images:
        prepared = detector.prepare(read())
        inputs.append({'patches': prepared.patches[None], 'grid': prepared.grid[None]})
    lengths = [x['patches'].shape[1] for x in inputs]
    for length in set(lengths):  # compile
        detector.outputs(inputs[lengths.index(length)])
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        'images': len(images),
        'parameters': sum(x.size for x in arrays),
        'bytes': sum(x.nbytes for x in arrays),
        'gflops': float(np.mean([macs(model, x['grid'][0]) for x in inputs])) / 1e9,
        'gflops_computed': float(np.mean([computed_macs(model, length) for length in lengths])) / 1e9,
        'fps': _rates(detector.outputs, inputs),
        'fps_from_file': _rates(lambda read: detector(read()), images),
        'peak_memory_gb': stats.get('peak_bytes_in_use', resident) / 1e9,
        'peak_memory_of': 'the device' if stats else 'the process',
        'device': jax.devices()[0].device_kind,
        'cpus': cpus.usable(),
    }


def _rates(run: Callable, inputs: Iterable) -> dict[str, float]:
    """Images per second: median, 10th and 90th percentile."""
    seconds = []
    for x in inputs:
        clock = time.perf_counter()
        run(x)
        seconds.append(time.perf_counter() - clock)
    low, middle, high = np.percentile(1 / np.array(seconds), (10, 50, 90))
    return {'median': float(middle), 'p10': float(low), 'p90': float(high)}


def table(numbers: dict, model: Yolos, size: int) -> str:
    """The numbers as text."""
    is_published = not model.registers and not model.rope and model.num_det_tokens == 100
    paper = PUBLISHED.get((model.width, model.depth)) if is_published else None
    beside = f'   (paper, at {paper[1]}: {paper[0]})' if paper else ''
    rows = [
        ('images', f'{numbers["images"]}, shorter side {size}'),
        ('parameters', f'{numbers["parameters"]:,}, {numbers["bytes"] / 1e6:.1f} MB'),
        ('GFLOPs', f'{numbers["gflops"]:.1f}{beside}'),
        ('  as 2 x', f'{2 * numbers["gflops"]:.1f}'),
        (
            '  computed here',
            f'{numbers["gflops_computed"]:.1f}, with padding, the last block for [DET] tokens alone',
        ),
        *model_card.timings(numbers),
    ]
    return '\n'.join(f'{name:<20} {value}' for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and measure."""
    parser = flags.parser(__doc__)
    flags.add_weights(parser)
    parser.add_argument('--data', required=True, help='a data folder')
    parser.add_argument('--split', default='val2017', help='the split (val2017)')
    parser.add_argument('--output', required=True, type=Path, help='a folder for speed.json')
    parser.add_argument('--images', type=int, default=100, help='how many images, the first ones (100)')
    args = parser.parse_args(arguments)
    files.check_folder(args.output)
    if args.images < 1:
        raise InputError(f'images is {args.images}, less than 1', 'images')
    data = records.read(args.data, args.split)
    options = dict(log=print, batch_size=1, **flags.hints(args))
    detector = Detector.from_pretrained(args.weights, args.step, **options)
    images = [functools.partial(photograph, data, i) for i in range(min(args.images, len(data)))]
    numbers = measure(detector, images)
    about = {'size': detector.size, 'method': METHOD}
    about['fingerprint'] = integrity.fingerprint(jax.device_get(detector.params))
    files.write_json(args.output / 'speed.json', numbers | about)
    print(table(numbers, detector.model, detector.size))
    print(METHOD)


if __name__ == '__main__':
    cli.run(main)
