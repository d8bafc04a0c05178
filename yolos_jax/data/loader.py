"""Loads batches ahead of their use, in threads.

Decoding, resizing and copying release the GIL, so threads use every core; nothing is pickled and the
records exist once.
"""

import collections
import concurrent.futures
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from yolos_jax import cpus
from yolos_jax.data.labelled import LabelledImages
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError, StorageError

AHEAD = 4  # batches in flight: enough to hide a slow one, few enough to bound memory
FEW = 8  # a batch of fewer images takes replacements from later batches too
READS = 256  # images requested from a bucket beyond these: 40 MB; 128 are under way at once (`bucket`)


class Rows(NamedTuple):
    """What is loaded into the rows of one batch."""

    candidates: list[np.ndarray]  # of each row: record indices, the first that can be read is used
    fill: Callable[[int, int, Any, dict], None]  # (row, record index, its image, the row's arrays)
    length: int  # of the sequences
    required: bool  # whether every row must have an image


def in_turn(indices: np.ndarray, lengths: np.ndarray, i: int) -> list[np.ndarray]:
    """The candidates of each row of batch i: its own record first, then those of the rows after it.

    The images of a small batch may all be bad, so it also gets those of the next batches of its length.
    indices [steps, B] and lengths [steps]: the plan of the epoch.
    """
    around, B = np.concatenate([indices[i], indices[i]]), len(indices[i])
    candidates = [around[row : row + B] for row in range(B)]
    if B >= FEW:
        return candidates
    same = np.flatnonzero(lengths == lengths[i])
    after = np.roll(same, -1 - np.searchsorted(same, i))[:FEW]
    return [np.concatenate([of_row, indices[after].ravel()]) for of_row in candidates]


class Batches(Protocol):
    """The interface of what `load` loads; see `batches` and `class_batches`."""

    bad: 'BadImages'

    def rows(self, step: int) -> Rows:
        """The rows of a step."""

    def start_image(self, index: int) -> Callable[[], Any]:
        """A function that returns the image of a record for `Rows.fill`, or raises InputError."""

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch before it is loaded."""


class BadImages:
    """The images of a data set that turned out to be unreadable: each is named once."""

    def __init__(self, records: Records | LabelledImages) -> None:
        self._records, self._indices, self._lock = records, set(), threading.Lock()

    def note(self, index: int, error: InputError) -> None:
        """Report an image; raises InputError once more than the records' `bad_images` are bad."""
        with self._lock:
            if index in self._indices:
                return
            self._indices.add(index)
            tolerated, total = self._records.bad_images, len(self._records)
            if len(self._indices) > tolerated:
                raise InputError(
                    f'{error}; more than {tolerated} of {total} images are bad{self._records.advice}',
                    'bad_images',
                )
            print(f'left out: {error}', file=sys.stderr, flush=True)


def load(
    batches: Batches, steps: Iterable[int], part: slice = slice(None), threads: int | None = None
) -> Iterator[tuple[int, dict, np.ndarray]]:
    """Yield (step, batch, indices) for each of `steps`, in order, loading ahead.

    An image that cannot be read, or whose size differs from the annotations, is replaced by the next
    readable one of its batch or, if it has fewer than 8 images, of the next batches of its length. Which
    images a batch has is a function of (seed, step) alone, so the batch is the same in every run and on any
    number of processes. In an evaluation the image's row stays empty.

    Args:
        batches: what to load. part: the rows of each batch to load. threads: how many read and decode; when
            None one for each CPU of this process.

    Returns:
        batch: the arrays of `batches.empty`, filled. A detector's are 'patches' uint8 [B, N, 768], 'grid'
        int32 [B, 2], 'labels' int32 [B, T], 'boxes' float32 [B, T, 4] cxcywh in 0..1, 'valid' bool [B, T]
        and 'dropped' int32 [B], objects beyond T; a row without a record is black, 1x1, and has no targets.
        indices int64 [B]: the records in the batch, -1 for none.

    Raises:
        InputError: too many images are bad (`BadImages`), or all those of a batch; the message names one.
    """
    asked, filling = _ask_ahead(batches, steps, part), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads or cpus.usable()) as pool:
        try:
            while True:
                while len(filling) < AHEAD and (one := next(asked, None)) is not None:
                    filling.append((one.step, one.rows.required, *_submit(pool, batches, one)))
                if not filling:
                    return
                step, required, batch, jobs = filling.popleft()
                concurrent.futures.wait(jobs)  # awake once a batch, not once an image
                of_rows = dict(itertools.chain.from_iterable(job.result().items() for job in jobs))
                indices = np.array([of_rows[row] for row in sorted(of_rows)], np.int64)
                if required and -1 in indices:
                    raise InputError(f'no image of batch {step} can be read')
                yield step, batch, indices
        finally:
            pool.shutdown(cancel_futures=True)


class _Group(NamedTuple):
    """Rows of a batch with the same image, which is read once and replaced alike."""

    rows: list[int]  # of the batch of all processes
    candidates: np.ndarray  # of the first row
    image: Callable[[], Any] | None  # of the first candidate, requested already


class _Asked(NamedTuple):
    """A batch whose images are requested."""

    step: int
    rows: Rows
    groups: list[_Group]


def _ask_ahead(batches: Batches, steps: Iterable[int], part: slice) -> Iterator[_Asked]:
    """Each batch, once at least `READS` images of later batches are requested."""
    asked, reads = collections.deque(), 0
    for step in steps:
        rows, wanting = batches.rows(step), collections.defaultdict(list)
        for row in range(len(rows.candidates))[part]:
            wanting[rows.candidates[row][0]].append(row)
        ask = lambda index: batches.start_image(index) if index >= 0 else None
        groups = [_Group(same, rows.candidates[same[0]], ask(index)) for index, same in wanting.items()]
        asked.append(_Asked(step, rows, groups))
        reads += len(groups)
        while reads - len(asked[0].groups) >= READS:
            reads -= len(asked[0].groups)
            yield asked.popleft()
    yield from asked


def _submit(
    pool: concurrent.futures.Executor, batches: Batches, asked: _Asked
) -> tuple[dict, list[concurrent.futures.Future]]:
    """Let threads fill a batch; returns its arrays and, for each group, a future of {row: record}."""
    ours = sorted(row for group in asked.groups for row in group.rows)
    batch, jobs = batches.empty(len(ours), asked.rows.length), []
    for group in asked.groups:
        # views, even of single numbers
        arrays = [{name: x[row - ours[0], ...] for name, x in batch.items()} for row in group.rows]
        jobs.append(pool.submit(_fill_rows, batches, asked.rows.fill, group, arrays))
    return batch, jobs


def _fill_rows(batches: Batches, fill: Callable, group: _Group, arrays: list[dict]) -> dict[int, int]:
    """Fill rows with their first readable candidate; returns {row: its record, or -1}."""
    for tries, index in enumerate(group.candidates[group.candidates >= 0]):
        read = batches.start_image(index) if tries else group.image
        try:
            image = read()
        except StorageError:
            raise  # not the fault of the image
        except InputError as error:
            batches.bad.note(index, error)
            continue
        for row, of_row in zip(group.rows, arrays, strict=True):
            fill(row, index, image, of_row)
        return dict.fromkeys(group.rows, index)
    return dict.fromkeys(group.rows, -1)
