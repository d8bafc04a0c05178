"""What the scripts share: error lines that name a flag, the flags of a cluster, and memory settings."""

import argparse
import contextlib
import ctypes
import sys
from collections.abc import Callable

from absl import app
from absl import logging as absl_logging

from yolos_jax.errors import InputError

WEIGHTS = 'a workdir, checkpoint, Hugging Face folder or .pth'


def run(main: Callable[[], None], flag: str = '--{}') -> None:
    """Call `main()`; an `InputError` becomes one line on stderr and exit status 1.

    flag: how this script spells the flag of an argument that an error names.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax is talkative
    try:
        main()
    except BaseException as error:
        if isinstance(error, InputError):
            where = f' ({flag.format(error.argument)})' if error.argument else ''
            error = InputError(f'{error}{where}')
        _leave_cluster(error)
        if not isinstance(error, InputError):
            raise
        sys.exit(f'error: {error}')


def _leave_cluster(error: BaseException) -> None:
    """Of several processes, end this one at once; a script that imports no cluster has none."""
    cluster = sys.modules.get('yolos_jax.run.cluster')
    if cluster and not cluster.is_alone():
        cluster.leave(error)


def run_with_flags(main: Callable[[], None]) -> None:
    """As `run`, for a script with absl flags; a misspelt config key is an error that names the nearest."""
    try:
        app.run(lambda _: run(main, flag='--config.{}'))
    except AttributeError as error:
        if 'Did you mean' not in str(error):
            raise
        sys.exit('error: --config has no key ' + str(error).strip('"\'').replace('\\n', ' '))


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cluster.start`, for a script that parses its flags with argparse."""
    parser.add_argument('--coordinator', help='host:port of process 0, where no scheduler lists the hosts')
    parser.add_argument('--num_processes', type=int, help='how many there are; 1 to be alone in any case')
    parser.add_argument('--process_id', type=int, help='which of them this is: 0, 1, ...')
    parser.add_argument('--heartbeat', type=int, default=30, help='seconds until a silent process is dead')


def keep_memory() -> None:
    """Let glibc keep freed memory: on a CPU it goes back to the system and is cleared anew in every step.

    Training the quickstart on two cores is 1.4 times as fast for it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 28)
