"""Stops a run between steps when a signal asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jax.experimental import multihost_utils

from yolos_jax.run import cluster


class StopRun(Exception):  # noqa: N818  no error
    """The run was asked to stop while it was not training."""


class StopSignal:
    """Whether a run was asked to stop, by SIGTERM, Ctrl-C or the end of its terminal (SIGHUP).

    A second request ends the process at once, except SIGHUP, which the shell and the kernel both send.

    Scripts make it before anything else. Until `hold` is called, a request ends the process at once, as
    there is nothing to save. In a cluster any process may be asked, and all stop after the same step: JAX
    handles SIGTERM from the start of the cluster on, and tells the others.
    """

    def __init__(self) -> None:
        self.number = None  # of the signal that asked
        self._asked = 0  # how often `together` was called
        self._holding = False
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {n: signal.signal(n, self._note) for n in numbers}

    def hold(self) -> None:
        """From here on a request is only noted, as the run has something to save."""
        self._holding = True

    def release(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP and self.number is not None:
            return
        if not self._holding or self.number is not None:
            os._exit(128 + number)
        self.number = number
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, b'\nstopping after this step; again to stop now\n')
        if not cluster.is_alone():
            os.kill(os.getpid(), signal.SIGTERM)

    def together(self) -> bool:
        """Whether to stop; every process asks after each step, and each batch of an evaluation."""
        if cluster.is_alone():
            return self.number is not None
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delays the KeyboardInterrupt of Ctrl-C to the end of the block; a second Ctrl-C raises at once."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    held = []

    def hold(*_: object) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(True)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt
