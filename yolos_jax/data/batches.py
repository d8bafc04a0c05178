"""Batches for a detector: which images are in each, and how the arrays are filled."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from yolos_jax.data import geometry, pixels, plan
from yolos_jax.data.cache import DecodedImages
from yolos_jax.data.geometry import Geometry
from yolos_jax.data.loader import BadImages, Rows, in_turn
from yolos_jax.data.records import Records
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH_DIM


class Plan(NamedTuple):
    """The batches of an epoch."""

    geometry: Geometry  # of all n records
    indices: np.ndarray  # of records, [steps, B]
    lengths: np.ndarray  # of the sequences of each step, [steps]


class _Batches:
    """What `TrainBatches` and `EvalBatches` share."""

    def __init__(self, records: Records, max_targets: int) -> None:
        self.records, self.max_targets, self.bad = records, max_targets, BadImages(records)

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """A batch of black images of one patch without targets, as `loader.load` describes it."""
        return {
            'patches': np.zeros((rows, length, PATCH_DIM), np.uint8),
            'grid': np.ones((rows, 2), np.int32),
            'labels': np.zeros((rows, self.max_targets), np.int32),
            'boxes': np.zeros((rows, self.max_targets, 4), np.float32),
            'valid': np.zeros((rows, self.max_targets), bool),
            'dropped': np.zeros(rows, np.int32),
        }

    def fill(self, drawn: Geometry, _: int, index: int, image: np.ndarray, row: dict) -> None:
        """Write an image and its objects under the drawn geometry into its row."""
        row['grid'][:] = drawn[index].grid
        pixels.place(image, drawn[index], row['patches'])
        _fill_targets(self.records, index, drawn[index], row)


class TrainBatches(_Batches):
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
        super().__init__(records, max_targets)
        self.steps_per_epoch = len(records) // batch_size
        self.cache: DecodedImages | None = None  # the images that were decoded before, if kept
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
        """The batches of an epoch."""
        if epoch != self._epoch:
            r = self.records
            drawn = geometry.draw(r.heights, r.widths, self._recipe, self._seed, epoch)
            batches = plan.plan(drawn.lengths, self._lengths, self._batch_size, self._seed, epoch)
            self._epoch, self._plan = epoch, Plan(drawn, *batches)
        return self._plan

    def rows(self, step: int) -> Rows:
        """The rows of a step. A bad image is replaced by the next good one of its batch."""
        epoch, i = divmod(step, self.steps_per_epoch)
        drawn, indices, lengths = self.plan(epoch)
        candidates = in_turn(indices, lengths, i)
        return Rows(candidates, functools.partial(self.fill, drawn), int(lengths[i]), required=True)

    def start_image(self, index: int) -> Callable[[], np.ndarray]:
        """A function that returns the pixels of a record, from the cache if they are in it."""
        if self.cache is None:
            return start_image(self.records, index)
        return self.cache.start(index, functools.partial(start_image, self.records, index))

    def waste(self) -> tuple[list[int], float]:
        """The lengths in use, and the share of the first epoch's patch tokens that is padding."""
        drawn, indices, lengths = self.plan(0)
        return np.unique(lengths).tolist(), plan.waste(drawn.counts, indices, lengths)


class EvalBatches(_Batches):
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
        """max_targets: of an image, for its losses. alter: (RGB image, image id) -> changed image."""
        super().__init__(records, max_targets)
        if not len(records):
            raise InputError(f'{records.source.path}: no images are left to evaluate')
        self._alter = alter
        truth = records.source.truth
        if truth and not truth.is_file():
            raise InputError(f'{truth}: no such file; evaluation needs the official annotation file')
        self._geometry = geometry.fixed(records.heights, records.widths, size, max_size)
        counts = self._geometry.lengths
        lengths = plan.choose_lengths(counts, int(counts.max()), 2)
        self._indices, self._lengths = plan.in_order(counts, lengths, batch_size)

    def __len__(self) -> int:
        return len(self._indices)

    def start_image(self, index: int) -> Callable[[], np.ndarray]:
        """A function that returns the pixels of a record, changed by `alter`."""
        image = start_image(self.records, index)
        if not self._alter:
            return image
        number = int(self.records.ids[index])
        return lambda: pixels.to_rgbx(self._alter(pixels.to_rgb(image()), number))

    def rows(self, step: int) -> Rows:
        """The rows of a step. The row of a bad image stays empty."""
        candidates = [np.array([index]) for index in self._indices[step]]
        fill = functools.partial(self.fill, self._geometry)
        return Rows(candidates, fill, int(self._lengths[step]), required=False)


def start_image(records: Records, index: int) -> Callable[[], np.ndarray]:
    """A function that returns the RGBX pixels of a record in the orientation of its boxes.

    It raises InputError if the image cannot be read. A bucket is asked for the file at once.
    """
    size, read = (records.heights[index], records.widths[index]), records.start_read(index)
    return lambda: pixels.decode_sized(read(), records.name(index), size, records.images.upright)


def photograph(records: Records, index: int) -> np.ndarray:
    """The RGB pixels of a record in the orientation of its boxes; raises InputError if it is unreadable."""
    return pixels.to_rgb(start_image(records, index)())


def _fill_targets(records: Records, index: int, drawn: Geometry, row: dict) -> None:
    """Write an image's objects under its geometry; if there are more than T, only the T largest."""
    boxes, labels = records.objects(index)
    boxes, kept = geometry.move_boxes(boxes, records.heights[index], records.widths[index], drawn)
    labels, T = labels[kept], len(row['valid'])
    row['dropped'][...] = max(len(boxes) - T, 0)
    if len(boxes) > T:
        largest = np.sort(np.argsort(-boxes[:, 2] * boxes[:, 3], kind='stable')[:T])
        boxes, labels = boxes[largest], labels[largest]
    k = len(boxes)
    row['labels'][:k], row['boxes'][:k], row['valid'][:k] = labels, boxes, True
