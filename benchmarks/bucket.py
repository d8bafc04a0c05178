"""Loading and training from a bucket that takes 80 ms to answer, against a local disk.

    python benchmarks/bucket.py [--delay=0.08] [--images=400] [--batches=100]

A server that speaks Google's protocol and a proxy that waits before each answer run on the last core;
loader and training have the others. Photographs as in data.py, as a COCO folder and as array_record files,
are loaded alternately for YOLOS-S in batches of 8; the first 100 batches of each turn do not count. Then
the quickstart is trained with data and workdir in the bucket, saved every 20 steps, while one request in
ten fails and one answer in ten is cut short; the result is the median time of a step after the first 20.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data import batches_of, write_coco

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
import storage
from yolos_jax.configs import quickstart, yolos_s

from yolos_jax.data import loader, records
from yolos_jax.run.train import Step, train
from yolos_jax.tools import build_tfds, make_shapes

BATCH, WARM = 8, 100  # images, batches that do not count


def serve(delay: float) -> None:
    """Run the server and the proxy; prints the proxy's URL, and ends with its input."""
    with storage.gcs() as url, storage.network(url, delay=delay) as (url, network):
        print(url, flush=True)
        sys.stdin.readline()
        network.fail = network.cut = 0.1
        sys.stdin.read()


def rate(data: records.Records, batches: int) -> float:
    """Images a second."""
    started = 0.0
    for i, _ in enumerate(loader.load(batches_of(data, yolos_s, BATCH), range(WARM + batches))):
        if i == WARM - 1:
            started = time.perf_counter()
    return batches * BATCH / (time.perf_counter() - started)


def step_seconds(data: str | Path, workdir: str | Path) -> float:
    """The median time of a step of a run."""
    config, times = quickstart.get_config(), []
    with config.unlocked():
        config.update(data=str(data), epochs=2, save_every=20, eval_every=2)

    def note(step: Step) -> None:
        step.metrics['loss'].block_until_ready()
        times.append(time.perf_counter())

    train(config, workdir, on_step=note)
    return float(np.median(np.diff(times)[20:]))


def main() -> None:
    """Start the server, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--delay', type=float, default=0.08)
    parser.add_argument('--images', type=int, default=400)
    parser.add_argument('--batches', type=int, default=100)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    *mine, servers = sorted(os.sched_getaffinity(0))
    if args.serve:
        os.sched_setaffinity(0, {servers})
        serve(args.delay)
        return
    command = [sys.executable, __file__, '--serve', f'--delay={args.delay}']
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, mine)
    with server, tempfile.TemporaryDirectory() as folder:
        os.environ |= storage.environment(server.stdout.readline().strip(), 'gs')
        os.environ['XDG_CACHE_HOME'] = f'{folder}/cache'
        root = Path(folder, 'coco')
        write_coco(root, args.images, ['train2017'], objects=1)
        places = {'COCO folder': root, 'array_record': build_tfds.build(root, Path(folder, 'tfds'))}
        for name, local in places.items():
            url = storage.upload(local, f'gs://{storage.BUCKET}/{local.name}')
            both = [records.read(place, 'train2017') for place in (local, url)]
            rates = np.array([[rate(data, args.batches) for data in both] for _ in range(args.rounds)])
            here, there = np.median(rates, axis=0)
            ratio = np.median(rates[:, 1] / rates[:, 0])
            print(f'{name:14} local {here:4.0f}/s, bucket {there:4.0f}/s: {ratio:.2f}', flush=True)
        shapes = Path(folder, 'shapes')
        make_shapes.write(shapes, {'train2017': 400, 'val2017': 16})
        url = storage.upload(shapes, f'gs://{storage.BUCKET}/shapes')
        server.stdin.write('lose\n')
        server.stdin.flush()
        times = []
        for i in range(args.rounds):
            here = step_seconds(shapes, Path(folder, f'run{i}'))
            times.append([here, step_seconds(url, f'gs://{storage.BUCKET}/run{i}')])
        (here, there), ratio = np.median(times, axis=0), np.median([b / a for a, b in times])
        print(f'a step of the quickstart: local {here * 1e3:.1f} ms, bucket {there * 1e3:.1f}: {ratio:.2f}')
        server.stdin.close()


if __name__ == '__main__':
    main()
