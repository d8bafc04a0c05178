"""Images per second from a bucket that takes 80 ms to answer, against a local disk.

    python benchmarks/bucket.py [--delay=0.08] [--images=400] [--batches=100]

A server that speaks Google's protocol and a proxy that waits before each answer run beside on the same
cores, which they take time from: the processor time of the loader alone is given too. Photographs as in
data.py, as a COCO folder and as array_record files, loaded for YOLOS-S in batches of 8, in turns; of each
turn the batches after the first 100 count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data import photograph

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
import storage
from yolos_jax.configs import yolos_s

from yolos_jax.data import geometry, loader, records
from yolos_jax.tools import build_tfds

SIZE, BATCH, WARM = (480, 640), 8, 100  # pixels, images, batches that do not count


def write_folder(root: Path, count: int) -> None:
    """A COCO folder of so many photographs with an object each."""
    rng, height, width = np.random.default_rng(0), *SIZE
    (root / 'annotations').mkdir(parents=True)
    (root / 'train2017').mkdir()
    images = [{'id': i, 'file_name': f'{i}.jpg', 'height': height, 'width': width} for i in range(count)]
    objects = [
        {'id': i, 'image_id': i, 'category_id': 1, 'bbox': [9, 9, 99, 99], 'area': 9801, 'iscrowd': 0}
        for i in range(count)
    ]
    for image in images:
        (root / 'train2017' / image['file_name']).write_bytes(photograph(rng, height, width))
    content = {'images': images, 'annotations': objects, 'categories': [{'id': 1, 'name': 'thing'}]}
    (root / 'annotations' / 'instances_train2017.json').write_text(json.dumps(content))


def serve(delay: float) -> None:
    """Run the server and the proxy; prints the proxy's URL, and ends with its input."""
    with storage.gcs() as url, storage.network(url, delay=delay) as (url, _):
        print(url, flush=True)
        sys.stdin.read()


def rate(data: records.Records, batches: int) -> tuple[float, float]:
    """Images a second, and of processor time of this process."""
    recipe = geometry.Recipe(**yolos_s.get_config().augment)
    source = loader.TrainBatches.make(
        data, recipe, num_lengths=8, special=101, batch_size=BATCH, max_targets=100, seed=0
    )
    started = cpu = 0.0
    for i, _ in enumerate(loader.load(source, range(WARM + batches))):
        if i == WARM - 1:
            started, cpu = time.perf_counter(), time.process_time()
    images = batches * BATCH
    return images / (time.perf_counter() - started), images / (time.process_time() - cpu)


def main() -> None:
    """Start the server, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--delay', type=float, default=0.08)
    parser.add_argument('--images', type=int, default=400)
    parser.add_argument('--batches', type=int, default=100)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.delay)
        return
    command = [sys.executable, __file__, '--serve', f'--delay={args.delay}']
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with server, tempfile.TemporaryDirectory() as folder:
        os.environ |= storage.environment(server.stdout.readline().strip(), 'gs')
        os.environ['XDG_CACHE_HOME'] = f'{folder}/cache'
        root = Path(folder, 'coco')
        write_folder(root, args.images)
        places = {'COCO folder': root, 'array_record': build_tfds.build(root, Path(folder, 'tfds'))}
        for name, local in places.items():
            url = storage.upload(local, f'gs://{storage.BUCKET}/{local.name}')
            both = [records.read(place, 'train2017') for place in (local, url)]
            rates = np.array([[rate(data, args.batches) for data in both] for _ in range(args.rounds)])
            (here, here_cpu), (there, there_cpu) = np.median(rates, axis=0)
            ratio = np.median(rates[:, 1] / rates[:, 0], axis=0)
            print(
                f'{name:14} local {here:6.0f}/s, bucket {there:6.0f}/s ({ratio[0]:.2f}); '
                f'a second of processor: {here_cpu:.0f}, {there_cpu:.0f} ({ratio[1]:.2f})',
                flush=True,
            )
        server.stdin.close()


if __name__ == '__main__':
    main()
