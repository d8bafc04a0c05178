"""Images as a `Detector` computes them: resized, as patches, in batches of few sequence lengths."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from yolos_jax import pictures
from yolos_jax.data import geometry, pixels
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH, PATCH_DIM, round_up
from yolos_jax.pictures import Picture

SHAPES = 1, 4 / 3, 3 / 2  # long side / short side of common photographs


class Prepared(NamedTuple):
    """An image as the model takes it."""

    image: Picture  # as it was given, or the bytes of a link or open file
    size: tuple[int, int]  # height, width
    patches: np.ndarray | None
    grid: np.ndarray


def prepare(image: Picture, size: int, max_size: int, lengths: Sequence[int], *, keep: bool) -> Prepared:
    """An image resized for a detector, and padded to the first of `lengths` that holds it.

    keep: as for `Detector.prepare`. Raises InputError if the image cannot be read.
    """
    name = image if isinstance(image, str) else pictures.NAME
    image = pictures.opened(image)
    array = pictures.decoded(image, name)
    height, width = array.shape[:2]
    resized = geometry.fixed([height], [width], size, max_size)
    count = int(resized.lengths[0])
    longer = round_up(count, lengths[-1])  # for a panorama, if max_size allows one
    length = next((length for length in lengths if length >= count), longer)
    patches = np.zeros((length, PATCH_DIM), np.uint8)
    pixels.place(array, resized[0], patches)
    image = pixels.to_rgb(array) if keep else image
    return Prepared(image, (height, width), patches, resized.grid[0])


def in_batches(
    images: Sequence[Prepared | InputError], batch_size: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """(indices into `images`, the batch of these), each of one sequence length; errors are left out.

    A row without an image is one black patch.
    """
    by_length = collections.defaultdict(list)
    for i, image in enumerate(images):
        if isinstance(image, Prepared):
            by_length[len(image.patches)].append(i)
    for length, same in by_length.items():
        for start in range(0, len(same), batch_size):
            members = same[start : start + batch_size]
            patches = np.zeros((batch_size, length, PATCH_DIM), np.uint8)
            grid = np.ones((batch_size, 2), np.int32)
            for row, i in enumerate(members):
                patches[row], grid[row] = images[i].patches, images[i].grid
            yield members, {'patches': patches, 'grid': grid}


def sequence_lengths(size: int, max_size: int) -> list[int]:
    """The sequence lengths, in patches, that a detector pads to: few, so that few programs are compiled.

    Each of `SHAPES` has its own length, without padding. Other images get the shortest length that holds
    them; the last one is for 2 : 1.
    """
    widths = [round(side * 1200) for side in SHAPES]
    counts = geometry.fixed(np.full(len(widths), 1200), np.array(widths), size, max_size).counts
    most = (size // PATCH) * (min(max_size, 2 * size) // PATCH)
    return sorted({*counts.tolist(), most})
