"""Photographs a second through `Detector`: one by one, and as a list, in turns.

    python benchmarks/detect.py [--model YOLOS_TI] [--size 512] [--count 200] [--rounds 3]

Random weights, photographs of 640 x 480 as JPEG files. A list is read ahead by threads while the device
computes; on a GPU or TPU it is computed in batches of 8 too.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from data import photograph

import yolos_jax
from yolos_jax import weights
from yolos_jax.model import init_params


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model', default='YOLOS_TI')
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--count', type=int, default=200)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batch_size', type=int)
    args = parser.parse_args()
    model = (
        yolos_jax.Yolos(**getattr(yolos_jax, args.model))
        if args.model != 'small'
        else yolos_jax.Yolos(width=128, depth=4, heads=4, pos_grid=(7, 8), num_det_tokens=20)
    )
    pretrained = weights.Pretrained(
        model, init_params(model, jax.random.key(0)), {}, args.size, args.size * 1333 // 800
    )
    detector = yolos_jax.Detector(pretrained, batch_size=args.batch_size)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f'{i}.jpg' for i in range(args.count)]
        for path in paths:
            path.write_bytes(photograph(rng, 480, 640))
        detector(paths[:2])
        ways = {'one by one': lambda: [detector(path) for path in paths], 'a list': lambda: detector(paths)}
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, run in ways.items():
                clock = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - clock)
    for name, values in seconds.items():
        print(f'{name:<12} {args.count / np.median(values):8.1f} images/s')
    ratio = np.median(np.divide(*seconds.values()))
    device = jax.devices()[0].device_kind
    print(f'a list is {ratio:.2f} times as fast (median of {args.rounds} rounds), {device}')


if __name__ == '__main__':
    main()
