"""Whether a run was asked to stop."""

import signal
from types import FrameType

from jax.experimental import multihost_utils

from yolos_jax.run import cluster


class StopSignal:
    """Whether the run was asked to stop (SIGTERM; alone also Ctrl-C); a second request ends it at once.

    Of several processes any may be asked, and all stop after the same step: JAX takes the signal then.
    """

    def __init__(self) -> None:
        self._asked = False
        if cluster.is_alone():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; every process asks at every step."""
        return self._asked if cluster.is_alone() else multihost_utils.reached_preemption_sync_point(step)
