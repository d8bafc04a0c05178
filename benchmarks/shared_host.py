"""Images per second that 8 processes of one host load together, against one process with all its CPUs.

    python benchmarks/shared_host.py [--processes=8] [--images=400]

Each process has as many threads as `cluster.threads` gives it when that many share a host, and loads its
rows of the same batches for YOLOS-S. Photographs as in data.py; both sides alternate, from a common start.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
from data import batches_of, write_data
from yolos_jax.configs import yolos_s

from yolos_jax import cpus
from yolos_jax.data import loader
from yolos_jax.data.records import Records

BATCH, STEPS, WARM = 16, 40, 5


def load(data: Records, process: int, processes: int, barrier) -> None:
    """Load the rows of one process."""
    threads = max(cpus.usable() // processes, 1)
    source = batches_of(data, yolos_s, BATCH)
    rows = slice(process * BATCH // processes, (process + 1) * BATCH // processes)
    for _ in loader.load(source, range(WARM), rows, threads):
        pass
    barrier.wait()
    for _ in loader.load(source, range(STEPS), rows, threads):
        pass
    barrier.wait()


def seconds(data: Records, processes: int) -> float:
    """How long so many processes take together."""
    context = multiprocessing.get_context('spawn')
    barrier = context.Barrier(processes + 1)
    started = [context.Process(target=load, args=(data, i, processes, barrier)) for i in range(processes)]
    for process in started:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - start
    for process in started:
        process.join()
    return elapsed


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--processes', type=int, default=8)
    parser.add_argument('--images', type=int, default=400)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), args.images)
        times = np.array([[seconds(data, n) for n in (1, args.processes)] for _ in range(args.rounds)])
    one, many = BATCH * STEPS / np.median(times, axis=0)
    threads = max(cpus.usable() // args.processes, 1)
    print(f'1 process, {cpus.usable()} threads: {one:.0f} images/s')
    print(f'{args.processes} processes, {threads} thread each: {many:.0f} images/s ({many / one:.2f})')


if __name__ == '__main__':
    main()
