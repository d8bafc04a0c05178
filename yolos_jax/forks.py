"""Raises an error in a process that was forked after its parent read weights: JAX would hang there."""

import os

_process: int | None = None  # the first to read weights; the children that it forks inherit this


def check() -> None:
    """Note that this process is about to use JAX.

    Raises:
        RuntimeError: it was forked by one that has called this.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise RuntimeError(
            'weights cannot be read, nor a Detector used, after a fork of a process that has read some: '
            "start the process or pool by multiprocessing.get_context('spawn'), or read the first in it"
        )
