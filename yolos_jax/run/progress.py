"""Progress bar, metric files, and the means that go into them."""

import copy
import json
import os
import sys
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Log:
    """Writes metrics.jsonl and TensorBoard files to a run's folder, and lines to the terminal."""

    def __init__(self, workdir: str | Path, first: int, total: int, speaks: bool = True) -> None:
        """first, total: the step the run starts from, and its last. speaks: False writes nothing.

        What an earlier run wrote beyond `first` is dropped, so that the files of a resumed run are those
        of an unbroken one.
        """
        path = Path(workdir) / 'metrics.jsonl' if speaks else Path(os.devnull)
        if path.is_file():
            lines = [line for line in path.read_text().splitlines(True) if line.endswith('\n')]
            path.write_text(''.join(line for line in lines if json.loads(line)['step'] <= first))
        self._file = open(path, 'a', buffering=1)  # noqa: SIM115  closed by `close`
        self._board = SummaryWriter(str(workdir), purge_step=first + 1, write_to_disk=speaks)
        self._speaks = speaks
        self._bar = tqdm(
            total=total,
            initial=first,
            dynamic_ncols=True,
            disable=not (speaks and sys.stderr.isatty()),
            bar_format='{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]',
        )
        self._total = total

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        self._file.write(json.dumps({'step': step, **metrics}) + '\n')
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        shown = {k: f'{metrics[k]:.4g}' for k in ('loss', 'images_per_s', 'AP', 'AP50') if k in metrics}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable and shown:
            self.print(f'step {step}/{self._total} ' + ' '.join(f'{k} {v}' for k, v in shown.items()))

    def print(self, text: str) -> None:
        """A line on the terminal, above the bar."""
        if self._speaks:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
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


class Means:
    """Means of the steps' metrics, over the steps since the last log line and over the epoch.

    The metrics of a step are read after the next step is dispatched, so that the device never waits. The
    sums are plain numbers, `state()`, and go into the checkpoint: a resumed run reports the same means as
    an unbroken one. Steps that are not finite stay out of the means.
    """

    def __init__(self, sums: dict | None = None) -> None:
        """sums: a `state()`; None starts from scratch."""
        self._sums = sums or {'window': {}, 'epoch': {}}
        self._pending = None
        self.nonfinite_streak = 0  # steps in a row, up to the last one read

    def add(self, metrics: dict) -> None:
        """Add the metrics of a step, arrays that may still be computed; reads those of the step before."""
        self.settle()
        self._pending = metrics

    def settle(self) -> None:
        """Wait for the last step's metrics and add them."""
        if self._pending is None:
            return
        metrics = {name: float(value) for name, value in jax.device_get(self._pending).items()}
        self._pending = None
        finite = metrics.pop('finite')
        self.nonfinite_streak = 0 if finite else self.nonfinite_streak + 1
        if finite:
            for sums in self._sums.values():
                for name, value in (metrics | {'count': 1}).items():
                    sums[name] = sums.get(name, 0) + value

    def mean(self, span: str) -> dict[str, float]:
        """The means over the 'window' or the 'epoch', of the steps that have settled."""
        count = self._sums[span].get('count', 0)
        return {name: value / count for name, value in self._sums[span].items() if name != 'count'}

    def restart(self, span: str) -> None:
        """Start the 'window' or the 'epoch' anew."""
        self._sums[span] = {}

    def state(self) -> dict:
        """What `__init__` takes."""
        return copy.deepcopy(self._sums)
