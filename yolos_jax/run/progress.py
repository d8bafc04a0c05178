"""Progress bar, metric files, and the means that go into them."""

import collections
import contextlib
import copy
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.run import run_files
from yolos_jax.run.board import Board

SPIKE_WINDOW = 50  # steps whose median a spike is compared with


class Log:
    """Writes metrics.jsonl and TensorBoard files to a run's folder, and lines to the terminal and log.txt.

    A run does not end because its metrics cannot be written: a line reports it once, and the
    metrics are written with the next ones.
    """

    def __init__(
        self,
        workdir: str | Path,
        steps: range,
        *,
        per_epoch: int = 1,
        writes: bool = True,
        evaluated: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the files.

        steps: those of this start up to the run's last. per_epoch: steps of an epoch. writes: False writes
            nothing. check: called before each line; raises InputError if the folder is not the run's any
            more.

        Lines that an earlier start wrote after the first step are dropped, and its evaluation of that step
        too unless `evaluated`, so that the files of a resumed run equal those of an unbroken one.
        """
        first, total = steps.start, steps.stop
        self._writes, self._total, self._pending, self._failed = writes, total, '', False
        self._check = check
        self.folder = Path(workdir)
        self._path, self._text = self.folder / run_files.METRICS, self.folder / run_files.LOG
        self._per_epoch = per_epoch
        self.last_step = self._drop_after(first, evaluated) if writes else 0  # of the earlier start
        self._board = Board(self.folder, first)
        self._bar = tqdm(
            total=total,
            initial=first,
            dynamic_ncols=True,
            disable=not (writes and sys.stderr.isatty()),
            bar_format='{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]',
        )

    def _drop_after(self, first: int, evaluated: bool) -> int:
        """Write the file again without dropped and damaged lines; returns the last step that was in it."""
        kept, last, damaged = [], 0, 0
        try:
            lines = self._path.read_bytes().splitlines(True) if self._path.exists() else []
        except OSError as error:
            raise InputError(f'{self._path}: cannot be read ({error.strerror})') from None
        for line in lines:
            is_whole = line.endswith(b'\n')  # else a killed run was writing it
            try:
                content = json.loads(line)
                step = content['step']
                last = max(last, step)
                of_evaluation = content.keys() & {'AP', 'top1'}
                is_dropped = step > first or step == first and of_evaluation and not evaluated
                if is_whole and not is_dropped:
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                damaged += is_whole
        with files.replacing(self._path) as file:
            file.writelines(kept)
        if damaged:
            what = 'lines were' if damaged > 1 else 'line was'
            self.print(f'{self._path}: {damaged} damaged {what} left out')
        return last

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step, with its epoch and the time (seconds since 1970)."""
        if not self._writes:
            return
        self._check()
        when = {'epoch': round(step / self._per_epoch, 4), 'time': round(time.time(), 3)}
        self._pending += json.dumps({'step': step, **when, **metrics}) + '\n'
        size = None
        try:
            with open(self._path, 'a') as file:
                size = file.tell()
                file.write(self._pending)
            self._pending, self._failed = '', False
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)  # removes a partly written line, written again later
            if not self._failed:
                self.print(f'{self._path}: cannot be written now ({error.strerror}); the run continues')
            self._failed = True
        self._board.scalars(step, metrics)
        shown = {
            k: f'{metrics[k]:.4g}'
            for k in ('loss', 'images_per_s', 'AP', 'AP50', 'top1', 'top5')
            if k in metrics
        }
        self._bar.set_postfix(shown, refresh=False)
        if shown:
            text = f'step {step}/{self._total} ' + ' '.join(f'{k} {v}' for k, v in shown.items())
            if self._bar.disable:
                self.print(text)
            else:
                self._keep(text)

    def config(self, config: dict[str, Any]) -> None:
        """Set the config that TensorBoard shows as hyper-parameters."""
        self._board.config = config

    def pictures(self, step: int, images: Iterable[np.ndarray]) -> None:
        """Write pictures, uint8 [height, width, 3], to TensorBoard."""
        if self._writes:
            self._board.pictures(step, images)

    def print(self, text: str) -> None:
        """Print a line on the terminal, above the bar, and in log.txt."""
        if self._writes:
            with contextlib.suppress(OSError):  # a terminal or pipe that was closed, a full disk
                tqdm.write(text)
                sys.stdout.flush()
            self._keep(text)

    def _keep(self, text: str) -> None:
        """Append a line to log.txt."""
        options = dict(encoding='utf-8', errors='backslashreplace')
        with contextlib.suppress(OSError), open(self._text, 'a', **options) as file:  # as for the metrics
            file.write(f'{text}\n')

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._board.close()


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
