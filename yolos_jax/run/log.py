"""What a run reports: metric files, TensorBoard, lines of text and a progress bar."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.progress_bar import is_terminal
from yolos_jax.run import run_files
from yolos_jax.run.board import Board


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
            disable=not (writes and is_terminal()),
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
            with contextlib.suppress(OSError, ValueError):  # a closed terminal or pipe, a full disk
                if sys.stdout is not None:  # as it is in a process without a console
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


def read_metrics(workdir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, without one that is still being written.

    Raises:
        InputError: it cannot be read, or is not what a run writes.
    """
    path = Path(workdir) / run_files.METRICS
    try:
        whole, _, _ = path.read_bytes().rpartition(b'\n')
        lines = [json.loads(line) for line in whole.splitlines()]
        if not all(type(line['step']) is int for line in lines):
            raise ValueError('a step that is no number')
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror})') from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f'{path}: not what a run writes ({error})') from None
    return lines
