"""Ends a process that makes no progress, with the stacks of its threads."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator

from yolos_jax.errors import InputError

STUCK = 1800  # seconds without a step after which a process of several ends


@contextlib.contextmanager
def started(seconds: int | None) -> Iterator[Callable[[], None]]:
    """Ends this process, with the stacks of its threads on stderr, after `seconds` without progress.

    Yields a function to call at every progress. Heartbeats come from a thread of their own and go on when
    the process is stuck, for example in a read that never ends. seconds: None or 0 to wait forever.

    It counts pauses of a thread, since a clock goes on while the process is suspended (by Ctrl-Z, or by
    Slurm): a suspension is one pause, however long. A thread that holds the GIL forever is not noticed.
    """
    if seconds and seconds < 0:
        raise InputError(f'stuck is {seconds}, less than 0 seconds', 'stuck')
    if not seconds:
        yield lambda: None
        return
    pauses, moved, ended = 60, threading.Event(), threading.Event()

    def watch() -> None:
        left = pauses
        while left:
            if ended.wait(seconds / pauses):
                return
            left = pauses if moved.is_set() else left - 1
            moved.clear()
        deadline = threading.Timer(5, os._exit, [1])  # stderr may be a pipe that nobody reads
        deadline.start()
        try:
            print(f'no progress in {seconds} seconds', file=sys.__stderr__)
            faulthandler.dump_traceback(sys.__stderr__)
        finally:  # or closed, or on a full disk
            os._exit(1)

    threading.Thread(target=watch, name='watchdog', daemon=True).start()
    try:
        yield moved.set
    finally:
        ended.set()
