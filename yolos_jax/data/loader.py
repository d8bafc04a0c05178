"""Batches, loaded ahead by threads.

Decoding, resizing and copying release the GIL, so threads use every core; nothing is pickled and the
records exist once.
"""

import collections
import concurrent.futures
import os
import sys
import threading

import numpy as np

from yolos_jax.data import geometry, pixels, plan
from yolos_jax.errors import InputError
from yolos_jax.model import PATCH

AHEAD = 4  # batches in flight: enough to hide a slow one, few enough to bound memory
TOLERATED = 0.001  # the share of images that may be bad


class TrainBatches:
    """The batches of a run: batch `step` is a function of (seed, step) and the records alone."""

    replaces = True  # a bad image

    def __init__(self, records, recipe, lengths, batch_size, max_targets, seed):
        self.records, self.max_targets, self.bad = records, max_targets, BadImages(records)
        self.steps_per_epoch = len(records) // batch_size
        self._recipe, self._lengths, self._batch_size, self._seed = recipe, lengths, batch_size, seed
        self._epoch, self._planned = None, None

    @classmethod
    def make(cls, records, recipe, num_lengths, batch_size, max_targets, seed, special):
        """The batches of a recipe with bucket lengths chosen from the sizes of the data.

        special: how many tokens a sequence has besides its patches (`plan.choose_lengths`).
        """
        sizes = records.heights, records.widths
        drawn = [geometry.draw(*sizes, recipe, seed, epoch)['shape'] for epoch in range(3)]
        counts = np.concatenate(drawn).prod(axis=1) // PATCH**2
        most = geometry.most_patches(*sizes, recipe)
        lengths = plan.choose_lengths(counts, most, num_lengths, special)
        return cls(records, recipe, lengths, batch_size, max_targets, seed)

    def plan(self, epoch):
        """The epoch's geometry (`geometry.draw`), record indices [steps, B] and lengths [steps]."""
        if epoch != self._epoch:
            r = self.records
            drawn = geometry.draw(r.heights, r.widths, self._recipe, self._seed, epoch)
            counts = drawn['shape'].prod(axis=1) // PATCH**2
            batches = plan.plan(counts, self._lengths, self._batch_size, self._seed, epoch)
            self._epoch, self._planned = epoch, (drawn, *batches)
        return self._planned

    def rows(self, step):
        """A step's record indices [B], their geometry, and the length of its sequences."""
        epoch, place = divmod(step, self.steps_per_epoch)
        drawn, batches, lengths = self.plan(epoch)
        return batches[place], drawn, int(lengths[place])

    def waste(self):
        """The lengths in use, and the share of the first epoch's patch tokens that is padding."""
        drawn, batches, lengths = self.plan(0)
        counts = drawn['shape'].prod(axis=1) // PATCH**2
        return np.unique(lengths).tolist(), plan.waste(counts, batches, lengths)


class EvalBatches:
    """Every record once, at evaluation size; -1 fills up the last batch."""

    max_targets, replaces = 0, False

    def __init__(self, records, size, max_size, batch_size):
        if not records.json.is_file():
            raise InputError(f'{records.json}: not there; evaluation is by the official annotation file')
        self.records, self.bad, self.batch_size = records, BadImages(records), batch_size
        self._drawn = geometry.fixed(records.heights, records.widths, size, max_size)
        counts = self._drawn['shape'].prod(axis=1) // PATCH**2
        lengths = plan.choose_lengths(counts, int(counts.max()), 2)
        self._batches, self._lengths = plan.in_order(counts, lengths, batch_size)

    def __len__(self):
        return len(self._batches)

    def rows(self, step):
        """As `TrainBatches.rows`."""
        return self._batches[step], self._drawn, int(self._lengths[step])


class BadImages:
    """The images of a data set that turned out to be unreadable: each is named once."""

    def __init__(self, records):
        self._records, self._found, self._lock = records, set(), threading.Lock()

    def note(self, index, error):
        """Name an image; raises InputError once they are more than 0.1 % of the data set."""
        with self._lock:
            if index in self._found:
                return
            self._found.add(index)
            count, total = len(self._found), len(self._records)
            if count > TOLERATED * total:
                raise InputError(
                    f'{error}; {count} of {total} images are bad, more than {TOLERATED:.1%}: '
                    'python -m yolos_jax.data.check lists them all'
                )
            print(f'left out: {error}', file=sys.stderr, flush=True)


def load(source, steps, part=slice(None)):
    """Yield (step, batch, indices) for each of `steps`, in order, loading ahead.

    An image that cannot be read, or is not of the size that the annotations give, is replaced by the next
    readable one of its batch, for which the plan is a function of (seed, step) alone, so the batch is the
    same in every run and on any number of processes. In an evaluation its row stays empty.

    Args:
        source: `TrainBatches` or `EvalBatches`. part: the rows of each batch to load.

    Returns:
        batch: 'patches' uint8 [B, N, 768], 'grid' int32 [B, 2], 'labels' int32 [B, T], 'boxes' float32
        [B, T, 4] cxcywh in 0..1, 'valid' bool [B, T]; a row without a record is black, 1x1, and has no
        targets. indices int64 [B]: the records in the batch, -1 for none.

    Raises:
        InputError: more than 0.1 % of the images are bad, or all those of a batch; the message names one.
    """
    steps, waiting = iter(steps), collections.deque()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            while True:
                while len(waiting) < AHEAD and (step := next(steps, None)) is not None:
                    waiting.append((step, *_submit(pool, source, step, part)))
                if not waiting:
                    return
                step, batch, jobs = waiting.popleft()
                indices = [job.result() for job in jobs]
                yield step, batch, np.array(indices, np.int64)
        finally:
            pool.shutdown(cancel_futures=True)


def empty_batch(rows, length, slots):
    """A batch of black images of one patch without targets, as `load` describes it."""
    return {
        'patches': np.zeros((rows, length, PATCH**2 * 3), np.uint8),
        'grid': np.ones((rows, 2), np.int32),
        'labels': np.zeros((rows, slots), np.int32),
        'boxes': np.zeros((rows, slots, 4), np.float32),
        'valid': np.zeros((rows, slots), bool),
    }


def _submit(pool, source, step, part):
    planned, drawn, length = source.rows(step)
    rows = range(len(planned))[part]
    batch, jobs = empty_batch(len(rows), length, source.max_targets), []
    for view, row in enumerate(rows):
        candidates = np.roll(planned, -row) if source.replaces else planned[row : row + 1]
        views = {name: values[view] for name, values in batch.items()}
        jobs.append(pool.submit(fill_row, source, candidates, drawn, views))
    return batch, jobs


def fill_row(source, candidates, drawn, row):
    """Fill a row of a batch with the first of the records that can be read; returns which, or -1."""
    records = source.records
    for index in candidates[candidates >= 0]:
        size = records.heights[index], records.widths[index]
        try:
            image = pixels.decode_sized(records.read(index), records.name(index), *size)
        except InputError as error:
            source.bad.note(index, error)
            last = error
            continue
        mine = {name: values[index] for name, values in drawn.items()}
        row['grid'][:] = mine['shape'] // PATCH
        pixels.place(image, mine, row['patches'])
        _fill_targets(records, index, mine, row)
        return index
    if source.replaces:
        raise InputError(f'{last}; no image of its batch can be read')
    return -1


def _fill_targets(records, index, drawn, row):
    """An image's objects under its geometry; of more than T the largest are kept."""
    found, labels = records.objects(index)
    boxes, kept = geometry.move_boxes(found, records.heights[index], records.widths[index], drawn)
    labels, T = labels[kept], len(row['valid'])
    if len(boxes) > T:
        largest = np.sort(np.argsort(-boxes[:, 2] * boxes[:, 3], kind='stable')[:T])
        boxes, labels = boxes[largest], labels[largest]
    k = len(boxes)
    row['labels'][:k], row['boxes'][:k], row['valid'][:k] = labels, boxes, True
