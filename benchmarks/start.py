"""How soon a run trains: from the start of the command to its first step, twice in one workdir.

    python benchmarks/start.py [--config=yolos_s] [--batch_size=2] [--rounds=2]

The first start compiles, the second reads the workdir's compiled/. The data are 64 small pictures, which
the config enlarges to its own sizes; both starts end as they begin their first step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from yolos_jax.tools import make_shapes

FIRST_STEP = """
import os, time
from yolos_jax.run import cli

train = cli.imported('train')

def main():
    train.main(on_step=lambda _: (print('first step', time.time(), flush=True), os._exit(0)))

cli.run_with_flags(main, train.KEYS)
"""


def seconds_to_first_step(arguments: list[str]) -> float:
    """Seconds from the start of a process that trains to its first step."""
    environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
    start = time.time()
    command = [sys.executable, '-c', FIRST_STEP, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if 'first step' not in done.stdout:
        raise SystemExit(done.stderr)
    return float(done.stdout.split('first step')[1].split()[0]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--config', default='yolos_s')
    parser.add_argument('--batch_size', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=2)
    args = parser.parse_args()
    times = []
    with tempfile.TemporaryDirectory() as folder:
        make_shapes.write(f'{folder}/data', {'train2017': 64, 'val2017': 4})
        for i in range(args.rounds):
            arguments = [f'--config={args.config}', f'--workdir={folder}/{i}']
            arguments += [f'--config.data={folder}/data', f'--config.batch_size={args.batch_size}']
            times.append([seconds_to_first_step(arguments) for _ in range(2)])
            print(f'first start {times[-1][0]:.1f} s, second {times[-1][1]:.1f} s', flush=True)
    first, second = np.median(times, axis=0)
    print(f'{args.config}: the second start is {first / second:.1f} times as soon at its first step')


if __name__ == '__main__':
    main()
