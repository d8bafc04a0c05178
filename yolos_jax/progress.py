"""What a run tells: a progress bar, metrics.jsonl and TensorBoard files."""

import copy
import json
import os
import sys
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from yolos_jax import cluster
from yolos_jax.errors import InputError

GIVE_UP = 10  # steps in a row without a finite loss


class Progress:
    """Writes a run's metrics to its folder and shows where it is."""

    def __init__(self, workdir, start, total):
        """start, total: the step the run starts from, and its last.

        What an earlier run wrote beyond `start` is dropped, so that the files of a resumed run are those
        of an unbroken one.
        """
        speaks = cluster.is_first()  # the others write nothing
        path = Path(workdir) / 'metrics.jsonl' if speaks else Path(os.devnull)
        if path.is_file():
            lines = [line for line in path.read_text().splitlines(True) if line.endswith('\n')]
            path.write_text(''.join(line for line in lines if json.loads(line)['step'] <= start))
        self._file = open(path, 'a', buffering=1)
        self._board = SummaryWriter(str(workdir), purge_step=start + 1, write_to_disk=speaks)
        self._speaks = speaks
        self._bar = tqdm(
            total=total,
            initial=start,
            dynamic_ncols=True,
            disable=not (speaks and sys.stderr.isatty()),
            bar_format='{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]',
        )
        self._total = total
        self.start_clock()

    def step(self, images):
        """Move the bar by one step of so many images."""
        self._bar.update()
        self._images += images

    def start_clock(self):
        """Count images per second from here: after anything that was not training."""
        self._clock, self._images = time.monotonic(), 0

    def images_per_s(self):
        """The speed since the clock was started; starts it."""
        speed = self._images / (time.monotonic() - self._clock)
        self.start_clock()
        return speed

    def write(self, step, metrics):
        """Record metrics {name: number} of a step."""
        self._file.write(json.dumps({'step': step, **metrics}) + '\n')
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        shown = {k: f'{metrics[k]:.4g}' for k in ('loss', 'images_per_s', 'AP', 'AP50') if k in metrics}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable and shown:
            self.say(f'step {step}/{self._total} ' + ' '.join(f'{k} {v}' for k, v in shown.items()))

    def say(self, text):
        """A line for the reader, above the bar."""
        if self._speaks:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self):
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
        self._board.close()


class Tally:
    """Means of the steps' metrics, over the last steps and over the epoch.

    A step's metrics are read when the next step is on its way, so that the device never waits. What has
    been added up is plain numbers, `state()`, and goes into the checkpoint: a resumed run reports the
    same means as an unbroken one.
    """

    def __init__(self, sums=None):
        self._sums = sums or {'window': {}, 'epoch': {}}
        self._waiting, self._bad = None, 0

    def add(self, step, metrics):
        """Add the metrics of a step, arrays that may still be on their way.

        Raises:
            InputError: the loss has not been finite for ten steps in a row.
        """
        self._settle()
        self._waiting = step, metrics

    def take(self, which):
        """The means of the 'window' or the 'epoch', which starts anew."""
        self._settle()
        sums, self._sums[which] = self._sums[which], {}
        count = sums.pop('count', 0)
        return {name: value / count for name, value in sums.items()}

    def state(self):
        """What `__init__` takes."""
        self._settle()
        return copy.deepcopy(self._sums)

    def _settle(self):
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite = metrics.pop('finite')
        self._bad = 0 if finite else self._bad + 1
        if self._bad == GIVE_UP:
            raise InputError(
                f'the loss was not finite in {GIVE_UP} steps up to {step} ({metrics}); none of them was '
                'applied. A smaller config.learning_rate often helps'
            )
        if finite:
            for sums in self._sums.values():
                for name, value in (metrics | {'count': 1}).items():
                    sums[name] = sums.get(name, 0) + value
