"""The batches of pre-training: images with one class each, augmented as DeiT does, for `loader.load`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from yolos_jax.data import augmentation, loader, pixels
from yolos_jax.data.labelled import LabelledImages
from yolos_jax.data.streams import Stream, generator
from yolos_jax.patches import PATCH, PATCH_DIM


class Plan(NamedTuple):
    """The batches of an epoch."""

    indices: np.ndarray  # of images, [steps, B]
    lengths: np.ndarray  # of the sequences of each step, [steps]: all the same


class _Batches:
    """The common base of `TrainBatches` and `EvalBatches`."""

    def __init__(self, records: LabelledImages) -> None:
        self.records, self.bad = records, loader.BadImages(records)

    def start_image(self, index: int) -> Callable[[], tuple[np.ndarray, int]]:
        """A function that returns the RGBX pixels and the label of an image, or raises InputError."""
        read, name = self.records.start_read(index), self.records.name(index)

        def image() -> tuple[np.ndarray, int]:
            data, label = read()
            return pixels.decode(data, name), label

        return image

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """A batch of black images: 'patches' uint8 [B, N, 768] and 'labels' int32 [B]."""
        patches = np.zeros((rows, length, PATCH_DIM), np.uint8)
        return {'patches': patches, 'labels': np.zeros(rows, np.int32)}


class TrainBatches(_Batches):
    """The batches of a run: batch `step` is a function of (seed, step) and the images alone."""

    def __init__(
        self,
        records: LabelledImages,
        recipe: augmentation.Recipe,
        *,
        batch_size: int,
        seed: int,
        teacher: np.ndarray | None = None,
    ) -> None:
        """teacher: int32 [n], a teacher's class for each image; it becomes 'teacher' in a batch."""
        super().__init__(records)
        self.steps_per_epoch = len(records) // batch_size
        self._recipe, self._batch_size, self._seed, self._teacher = recipe, batch_size, seed, teacher
        self._epoch, self._plan = None, None

    def plan(self, epoch: int) -> Plan:
        """The batches of an epoch: the shuffled images, each repeated, cut to the size of the data set.

        With R repeats an epoch sees 1 / R of the images, a different part each time (DeiT's RASampler).
        """
        if epoch != self._epoch:
            shuffled = generator(Stream.ORDER, self._seed, epoch).permutation(len(self.records))
            order = np.repeat(shuffled, self._recipe.repeats)
            steps, size = self.steps_per_epoch, self._recipe.size
            indices = order[: steps * self._batch_size].reshape(steps, self._batch_size)
            self._epoch, self._plan = epoch, Plan(indices, np.full(steps, (size // PATCH) ** 2))
        return self._plan

    def rows(self, step: int) -> loader.Rows:
        """The rows of a step. A bad image is replaced by the next good one of its batch.

        The copies of an image go to different groups, so they are mixed differently, as DeiT's RASampler
        gives them to different GPUs.
        """
        epoch, i = divmod(step, self.steps_per_epoch)
        indices, lengths = self.plan(epoch)
        candidates = loader.in_turn(indices, lengths, i)
        groups = self._batch_size // self._recipe.group
        dealt = [row for group in range(groups) for row in candidates[group::groups]]
        return loader.Rows(dealt, self._fill(step), int(lengths[i]), required=True)

    def _fill(self, step: int) -> Callable:
        r, where = self._recipe, {'seed': self._seed, 'step': step}
        draws = augmentation.draw(self._batch_size, **where)
        mix = augmentation.draw_mix(self._batch_size, r, **where)

        def fill(row: int, index: int, image: tuple, out: dict) -> None:
            image, label = image
            of_row = {name: values[row] for name, values in draws.items()}
            augmentation.train_image(image, r.size, of_row, out['patches'])
            out['labels'][...], out['noise'][...] = label, of_row['noise']
            if r.erasing:
                out['erase'][:] = augmentation.erase_box(r.size, of_row, r.erasing)
            for name, values in mix.items():
                out[name][...] = values[row]
            if self._teacher is not None:
                out['teacher'][...] = self._teacher[index]

        return fill

    def empty(self, rows: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a batch before it is loaded, as `mixing.augmented` takes them."""
        batch = super().empty(rows, length) | {
            'noise': np.zeros(rows, np.uint32),
            'weight': np.ones(rows, np.float32),
            'box': np.zeros((rows, 4), np.int32),
            'share': np.ones(rows, np.float32),
        }
        if self._recipe.erasing:
            batch['erase'] = np.zeros((rows, 4), np.int32)
        if self._teacher is not None:
            batch['teacher'] = np.zeros(rows, np.int32)
        return batch


class EvalBatches(_Batches):
    """The middle of every image, once; rows without an image fill up the last batch."""

    def __init__(self, records: LabelledImages, size: int, batch_size: int) -> None:
        super().__init__(records)
        self._size = size
        order = np.concatenate([np.arange(len(records)), np.full(-len(records) % batch_size, -1)])
        self._indices = order.reshape(-1, batch_size)

    def __len__(self) -> int:
        return len(self._indices)

    def rows(self, step: int) -> loader.Rows:
        """The rows of a step. The row of a bad image stays empty."""
        candidates = [np.array([index]) for index in self._indices[step]]
        return loader.Rows(candidates, self._fill, (self._size // PATCH) ** 2, required=False)

    def _fill(self, _: int, __: int, image: tuple, out: dict) -> None:
        image, out['labels'][...] = image
        augmentation.eval_image(image, self._size, out['patches'])
