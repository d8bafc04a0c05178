"""Says so where a process was forked after JAX was used: there JAX hangs, without a message."""

import os

_process: int | None = None  # the first to use JAX; the children that it forks inherit this


def check() -> None:
    """Note that this process is about to use JAX.

    Raises:
        RuntimeError: it was forked by one that has used JAX.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise RuntimeError(
            'a Detector does not work after a fork: start the process or the pool with '
            "multiprocessing.get_context('spawn'), or read the first weights in it"
        )
