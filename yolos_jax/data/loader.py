"""Batches, loaded ahead by threads.

Decoding, resizing and copying release the GIL, so threads use every core; nothing is pickled and the
records exist once.
"""

import collections
import concurrent.futures
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from yolos_jax import cpus
from yolos_jax.data import geometry, pixels, plan
from yolos_jax.data.cache import DecodedImages
from yolos_jax.data.geometry import Geometry
from yolos_jax.data.labelled import LabelledImages
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError, StorageError
from yolos_jax.patches import PATCH_DIM

AHEAD = 4  # batches in flight: enough to hide a slow one, few enough to bound memory
READS = 256  # images asked of a bucket before these: 3,200 a second where an answer takes 80 ms, and 40 MB


class Plan(NamedTuple):
    """What every batch of an epoch holds."""

    geometry: Geometry  # of all n records
    indices: np.ndarray  # of records, [steps, B]
    lengths: np.ndarray  # of the sequences of each step, [steps]


class Rows(NamedTuple):
    """What is loaded into the rows of one batch."""

    candidates: list[np.ndarray]  # of each row: record indices, the first that can be read is used
    fill: Callable[[int, int, Any, dict], None]  # (row, record index, its image, the row's arrays)
    length: int  # of the sequences
    required: bool  # whether every row must have an image


class TrainBatches:
    """The batches of a run: batch `step` is a function of (seed, step) and the records alone."""

    def __init__(
        self,
        records: Records,
        recipe: geometry.Recipe,
        *,
        lengths: Sequence[int],
        batch_size: int,
        max_targets: int,
        seed: int,
    ) -> None:
        self.records, self.max_targets, self.bad = records, max_targets, BadImages(records)
        self.steps_per_epoch = len(records) // batch_size
        self.cache: DecodedImages | None = None  # where images that were decoded before are
        self._recipe, self._lengths, self._batch_size, self._seed = recipe, lengths, batch_size, seed
        self._epoch, self._plan = None, None

    @classmethod
    def make(
        cls, records: Records, recipe: geometry.Recipe, *, num_lengths: int, special: int, **options: int
    ) -> 'TrainBatches':
        """The batches of a recipe with bucket lengths chosen from the sizes of the data.

        special: how many tokens a sequence has besides its patches (`plan.choose_lengths`); options: those
        of `__init__`.
        """
        sizes = records.heights, records.widths
        drawn = [geometry.draw(*sizes, recipe, options['seed'], epoch).lengths for epoch in range(3)]
        most = geometry.most_patches(*sizes, recipe)
        lengths = plan.choose_lengths(np.concatenate(drawn), most, num_lengths, special)
        return cls(records, recipe, lengths=lengths, **options)

    def plan(self, epoch: int) -> Plan:
        """What every batch of an epoch holds."""
        if epoch != self._epoch:
            r = self.records
            drawn = geometry.draw(r.heights, r.widths, self._recipe, self._seed, epoch)
            batches = plan.plan(drawn.lengths, self._lengths, self._batch_size, self._seed, epoch)
            self._epoch, self._plan = epoch, Plan(drawn, *batches)
        return self._plan

    def rows(self, step: int) -> Rows:
        """What is loaded for a step. A bad image is replaced by the next good one of its batch."""
        epoch, i = divmod(step, self.steps_per_epoch)
        drawn, indices, lengths = self.plan(epoch)
        return Rows(in_turn(indices[i]), filler(self.records, drawn), int(lengths[i]), required=True)

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch before it is loaded."""
        return empty_batch(rows, length, self.max_targets)

    def start_image(self, index: int) -> Callable[[], np.ndarray]:
        """What gives the pixels of a record, which is not read where it was decoded before."""
        if self.cache is None:
            return start_image(self.records, index)
        return self.cache.start(index, functools.partial(start_image, self.records, index))

    def waste(self) -> tuple[list[int], float]:
        """The lengths in use, and the share of the first epoch's patch tokens that is padding."""
        drawn, indices, lengths = self.plan(0)
        return np.unique(lengths).tolist(), plan.waste(drawn.counts, indices, lengths)


def in_turn(indices: np.ndarray) -> list[np.ndarray]:
    """The candidates of each row of a batch: its own record first, then those of the rows after it."""
    around = np.concatenate([indices, indices])
    return [around[row : row + len(indices)] for row in range(len(indices))]


class EvalBatches:
    """Every record once, at evaluation size; rows without an image fill up the last batch."""

    def __init__(
        self,
        records: Records,
        *,
        size: int,
        max_size: int,
        batch_size: int,
        max_targets: int = 0,
        alter: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> None:
        """max_targets: of an image, for its losses. alter: an RGB image and its id to another image."""
        self.max_targets, self._alter = max_targets, alter
        truth = records.source.truth
        if truth and not truth.is_file():
            raise InputError(f'{truth}: not there; evaluation is by the official annotation file')
        self.records, self.bad, self.batch_size = records, BadImages(records), batch_size
        self._geometry = geometry.fixed(records.heights, records.widths, size, max_size)
        counts = self._geometry.lengths
        lengths = plan.choose_lengths(counts, int(counts.max()), 2)
        self._indices, self._lengths = plan.in_order(counts, lengths, batch_size)

    def __len__(self) -> int:
        return len(self._indices)

    def start_image(self, index: int) -> Callable[[], np.ndarray]:
        """What gives the pixels of a record, altered."""
        image = start_image(self.records, index)
        if not self._alter:
            return image
        number = int(self.records.ids[index])
        return lambda: pixels.to_rgbx(self._alter(pixels.to_rgb(image()), number))

    def rows(self, step: int) -> Rows:
        """What is loaded for a step. The row of a bad image stays empty."""
        candidates = [np.array([index]) for index in self._indices[step]]
        fill = filler(self.records, self._geometry)
        return Rows(candidates, fill, int(self._lengths[step]), required=False)

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch before it is loaded."""
        return empty_batch(rows, length, self.max_targets)


class Batches(Protocol):
    """What `load` loads: of detection, or of `class_batches`."""

    bad: 'BadImages'

    def rows(self, step: int) -> Rows:
        """What is loaded for a step."""

    def start_image(self, index: int) -> Callable[[], Any]:
        """What gives the image of a record, as `Rows.fill` takes it, or raises InputError."""

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch before it is loaded."""


class BadImages:
    """The images of a data set that turned out to be unreadable: each is named once."""

    def __init__(self, records: Records | LabelledImages) -> None:
        self._records, self._indices, self._lock = records, set(), threading.Lock()

    def note(self, index: int, error: InputError) -> None:
        """Name an image; raises InputError once there are more than the records' `bad_images`."""
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
    source: Batches, steps: Iterable[int], part: slice = slice(None), threads: int | None = None
) -> Iterator[tuple[int, dict, np.ndarray]]:
    """Yield (step, batch, indices) for each of `steps`, in order, loading ahead.

    An image that cannot be read, or is not of the size that the annotations give, is replaced by the next
    readable one of its batch, for which the plan is a function of (seed, step) alone, so the batch is the
    same in every run and on any number of processes. In an evaluation its row stays empty.

    Args:
        source: what to load. part: the rows of each batch to load. threads: that read and decode; when
            None as many as there are CPUs for this process.

    Returns:
        batch: 'patches' uint8 [B, N, 768], 'grid' int32 [B, 2], 'labels' int32 [B, T], 'boxes' float32
        [B, T, 4] cxcywh in 0..1, 'valid' bool [B, T]; a row without a record is black, 1x1, and has no
        targets. indices int64 [B]: the records in the batch, -1 for none.

    Raises:
        InputError: too many images are bad (`BadImages`), or all those of a batch; the message names one.
    """
    started, waiting = _started(source, steps, part), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads or cpus.usable()) as pool:
        try:
            while True:
                while len(waiting) < AHEAD and (batch := next(started, None)) is not None:
                    waiting.append(_submit(pool, source, batch))
                if not waiting:
                    return
                job = waiting.popleft()
                concurrent.futures.wait(job.groups)  # awake once a batch, not once an image
                indices = np.concatenate([group.result() for group in job.groups]).astype(np.int64)
                if job.required and -1 in indices:
                    raise InputError(f'no image of batch {job.step} can be read')
                yield job.step, job.batch, indices
        finally:
            pool.shutdown(cancel_futures=True)


def empty_batch(rows: int, length: int, max_targets: int) -> dict[str, np.ndarray]:
    """A batch of black images of one patch without targets, as `load` describes it."""
    return {
        'patches': np.zeros((rows, length, PATCH_DIM), np.uint8),
        'grid': np.ones((rows, 2), np.int32),
        'labels': np.zeros((rows, max_targets), np.int32),
        'boxes': np.zeros((rows, max_targets, 4), np.float32),
        'valid': np.zeros((rows, max_targets), bool),
    }


class _Group(NamedTuple):
    """Rows of a batch, one after the other, that want the same image: it is read once."""

    rows: range  # of the batch of all processes
    candidates: np.ndarray
    image: Callable[[], Any] | None  # of the first candidate, asked for already


class _Started(NamedTuple):
    """A batch whose images are asked for."""

    step: int
    rows: Rows
    groups: list[_Group]


def _started(source: Batches, steps: Iterable[int], part: slice) -> Iterator[_Started]:
    """Each batch, with at least `READS` images of later ones asked for."""
    started, reads = collections.deque(), 0
    for step in steps:
        rows, groups = source.rows(step), []
        of_process = range(len(rows.candidates))[part]
        wanted = [row[0] for row in rows.candidates]
        for index, same in itertools.groupby(of_process, wanted.__getitem__):
            first, *others = same
            image = source.start_image(index) if index >= 0 else None
            span = range(first, first + 1 + len(others))
            groups.append(_Group(span, rows.candidates[first], image))
        started.append(_Started(step, rows, groups))
        reads += len(groups)
        while reads - len(started[0].groups) >= READS:
            reads -= len(started[0].groups)
            yield started.popleft()
    yield from started


class _Job(NamedTuple):
    """A batch that threads are filling."""

    step: int
    batch: dict
    groups: list[concurrent.futures.Future]  # each gives the records in its rows
    required: bool


def _submit(pool: concurrent.futures.Executor, source: Batches, started: _Started) -> _Job:
    step, rows, groups = started
    count, jobs, done = sum(len(group.rows) for group in groups), [], 0
    batch = source.empty(count, rows.length)
    for group in groups:
        span = range(done, done := done + len(group.rows))
        arrays = [
            {name: values[i, ...] for name, values in batch.items()} for i in span
        ]  # views, of a number too
        jobs.append(pool.submit(fill_rows, source, rows.fill, group, arrays))
    return _Job(step, batch, jobs, rows.required)


def fill_rows(source: Batches, fill: Callable, group: _Group, arrays: list[dict]) -> list[int]:
    """Fill rows with the first of their records that can be read; returns which in each, or -1."""
    first = group.image
    for index in group.candidates[group.candidates >= 0]:
        read, first = first or source.start_image(index), None
        try:
            image = read()
        except StorageError:
            raise  # says nothing of the image
        except InputError as error:
            source.bad.note(index, error)
            continue
        for row, of_row in zip(group.rows, arrays, strict=True):
            fill(row, index, image, of_row)
        return [index] * len(arrays)
    return [-1] * len(arrays)


def filler(records: Records, drawn: Geometry) -> Callable[[int, int, np.ndarray, dict], None]:
    """What fills a row with an image and its objects under the geometry drawn."""

    def fill(_: int, index: int, image: np.ndarray, row: dict) -> None:
        row['grid'][:] = drawn[index].grid
        pixels.place(image, drawn[index], row['patches'])
        _fill_targets(records, index, drawn[index], row)

    return fill


def start_image(records: Records, index: int) -> Callable[[], np.ndarray]:
    """What gives the pixels of a record, RGBX, as its boxes lie on them.

    It raises InputError where the image cannot be read. From a bucket its file is asked for now.
    """
    size, read = (records.heights[index], records.widths[index]), records.start_read(index)
    return lambda: pixels.decode_sized(read(), records.name(index), size, records.images.upright)


def _fill_targets(records: Records, index: int, drawn: Geometry, row: dict) -> None:
    """An image's objects under its geometry; of more than T the largest are kept."""
    boxes, labels = records.objects(index)
    boxes, kept = geometry.move_boxes(boxes, records.heights[index], records.widths[index], drawn)
    labels, T = labels[kept], len(row['valid'])
    if len(boxes) > T:
        largest = np.sort(np.argsort(-boxes[:, 2] * boxes[:, 3], kind='stable')[:T])
        boxes, labels = boxes[largest], labels[largest]
    k = len(boxes)
    row['labels'][:k], row['boxes'][:k], row['valid'][:k] = labels, boxes, True
