"""The numbers that a run counts from step to step: its speed, its goodput, and the means of its metrics."""

import collections
import copy
import math
import statistics
import time
from typing import Any

import jax

SPIKE_WINDOW = 50  # steps whose median a spike is compared with


class Throughput:
    """Images per second of training since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from here: after a log line, and after anything that was not training."""
        self._start, self._images = time.monotonic(), 0

    def add(self, images: int) -> None:
        """Count images that were trained on."""
        self._images += images

    def images_per_s(self) -> float:
        """The speed since the restart."""
        return self._images / (time.monotonic() - self._start)


class Goodput:
    """The share of a run's time that was training, over all its starts."""

    def __init__(self, state: dict | None = None, steps_lost: int = 0) -> None:
        """state: `state()` of the previous start; steps_lost: computed after it was saved."""
        before = state or {'training_s': 0.0, 'wall_s': 0.0, 'starts': 0, 'steps_lost': 0}
        self._training, self._start = before['training_s'], time.monotonic() - before['wall_s']
        self.starts, self.steps_lost = before['starts'] + 1, before['steps_lost'] + steps_lost

    def add(self, seconds: float) -> None:
        """Count seconds of training."""
        self._training += seconds

    def share(self) -> float:
        """The share so far, 0..1."""
        return self._training / max(time.monotonic() - self._start, 1e-9)

    def state(self) -> dict:
        """The `state` for `__init__`."""
        counts = {'starts': self.starts, 'steps_lost': self.steps_lost}
        return {'training_s': self._training, 'wall_s': time.monotonic() - self._start} | counts

    def __str__(self) -> str:
        starts = f'{self.starts} start{"s" if self.starts > 1 else ""}'
        return f'{self.share():.1%} of the time was training, {starts}, {self.steps_lost} steps lost'


class Means:
    """Means of the steps' metrics, over the steps since the last log line and over the epoch.

    The metrics of a step are read after the next step is dispatched, so that the device never waits. The
    sums are plain numbers, `state()`, and go into the checkpoint: a resumed run reports the same means as
    an unbroken one. Steps that are not finite stay out of the means.
    """

    def __init__(self, sums: dict | None = None, spike_factor: float = 0) -> None:
        """sums: a `state()`, or None. spike_factor: a loss above it times the median is a spike."""
        self._sums = sums or {'window': {}, 'epoch': {}}
        self._pending = None
        self._spike_factor, self._losses = spike_factor, collections.deque(maxlen=SPIKE_WINDOW)
        self.nonfinite_streak = 0  # steps in a row, up to the last one read
        self.image_ids = None  # of the last step read
        self._spikes = []  # since the last `pop_spikes`

    def add(self, metrics: dict, image_ids: Any = None) -> None:
        """Add the metrics of a step, arrays that may still be computed; reads those of the step before."""
        self.settle()
        self._pending = metrics, image_ids

    def settle(self) -> None:
        """Wait for the last step's metrics and add them."""
        if self._pending is None:
            return
        (metrics, self.image_ids), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._look_for_spike(metrics['loss'])
        finite = metrics.pop('finite')
        self.nonfinite_streak = 0 if finite else self.nonfinite_streak + 1
        if finite:
            for sums in self._sums.values():
                for name, value in (metrics | {'count': 1}).items():
                    sums[name] = sums.get(name, 0) + value

    def _look_for_spike(self, loss: float) -> None:
        median = statistics.median(self._losses) if len(self._losses) == SPIKE_WINDOW else math.inf
        if self._spike_factor and loss > self._spike_factor * median:
            text = f'the loss is {loss:.4g}, {loss / max(median, 1e-30):.1f} times its median of late'
            self._spikes.append((text, self.image_ids))
        if math.isfinite(loss):
            self._losses.append(loss)

    def pop_spikes(self) -> list[tuple[str, Any]]:
        """The loss spikes of the steps read since the last call: [(description, image ids), ...]."""
        spikes, self._spikes = self._spikes, []
        return spikes

    def pop_mean(self, span: str) -> dict[str, float]:
        """The means over the 'window' or the 'epoch', of the steps that have settled; starts it anew."""
        sums, self._sums[span] = self._sums[span], {}
        return {name: value / sums['count'] for name, value in sums.items() if name != 'count'}

    def state(self) -> dict:
        """The `sums` for `__init__`."""
        return copy.deepcopy(self._sums)
