"""Batches, loaded ahead by threads.

Decoding, resizing and copying release the GIL, so threads use every core; nothing is pickled and the
records exist once.
"""

import collections
import concurrent.futures
import os

import numpy as np

from yolos_jax.data import geometry, pixels, plan
from yolos_jax.model import PATCH

AHEAD = 4  # batches in flight: enough to hide a slow one, few enough to bound memory


class TrainBatches:
    """The batches of a run: batch `step` is a function of (seed, step) and the records alone."""

    def __init__(self, records, recipe, lengths, batch_size, max_targets, seed):
        self.records, self.max_targets = records, max_targets
        self.steps_per_epoch = len(records) // batch_size
        self._recipe, self._lengths, self._batch_size, self._seed = recipe, lengths, batch_size, seed
        self._epoch, self._planned = None, None

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


class EvalBatches:
    """Every record once, at evaluation size; -1 fills up the last batch."""

    max_targets = 0

    def __init__(self, records, size, max_size, batch_size):
        self.records = records
        self._drawn = geometry.fixed(records.heights, records.widths, size, max_size)
        counts = self._drawn['shape'].prod(axis=1) // PATCH**2
        lengths = plan.choose_lengths(counts, int(counts.max()), 2)
        self._batches, self._lengths = plan.in_order(counts, lengths, batch_size)

    def __len__(self):
        return len(self._batches)

    def rows(self, step):
        """As `TrainBatches.rows`."""
        return self._batches[step], self._drawn, int(self._lengths[step])


def load(source, steps, part=slice(None)):
    """Yield (step, batch) for each of `steps`, in order, loading ahead.

    source: `TrainBatches` or `EvalBatches`. part: the rows of each batch to load. batch: 'patches' uint8
    [B, N, 768], 'grid' int32 [B, 2], 'labels' int32 [B, T], 'boxes' float32 [B, T, 4] cxcywh in 0..1,
    'valid' bool [B, T]; a row without a record is black, 1x1, and has no targets.

    Raises:
        InputError: an image cannot be read; the message names the file.
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
                for job in jobs:
                    job.result()
                yield step, batch
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool, source, step, part):
    indices, drawn, length = source.rows(step)
    indices = indices[part]
    B, T = len(indices), source.max_targets
    batch = {
        'patches': np.zeros((B, length, PATCH**2 * 3), np.uint8),
        'grid': np.ones((B, 2), np.int32),
        'labels': np.zeros((B, T), np.int32),
        'boxes': np.zeros((B, T, 4), np.float32),
        'valid': np.zeros((B, T), bool),
    }
    jobs = []
    for row, index in enumerate(indices):
        if index >= 0:
            mine = {name: values[index] for name, values in drawn.items()}
            views = {name: values[row] for name, values in batch.items()}
            jobs.append(pool.submit(_fill, source.records, index, mine, views))
    return batch, jobs


def _fill(records, index, drawn, row):
    row['grid'][:] = drawn['shape'] // PATCH
    pixels.place(pixels.read_image(records.folder / records.files[index]), drawn, row['patches'])
    _fill_targets(records, index, drawn, row)


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
