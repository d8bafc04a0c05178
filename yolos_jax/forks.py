"""Raises an error in a process that was forked after its parent used JAX, which would hang there."""

import os

_process: int | None = None  # the first to use JAX; the children that it forks inherit this


def check() -> None:
    """Note that this process is about to use JAX.

    Raises:
        RuntimeError: it was forked by one that has called this.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise RuntimeError(
            'weights, a Detector or a run cannot be used after a fork of a process that used one: start '
            "the process or pool by multiprocessing.get_context('spawn'), or use the first in it"
        )
