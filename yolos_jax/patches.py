"""Images as sequences of 16 x 16 patches: the patch size, pixel statistics, patchify and unpatchify.

Letters: B images, N patches of a sequence with its padding.
"""

import math
from collections.abc import Sequence

import numpy as np

PATCH = 16  # pixels along a side
PATCH_DIM = 3 * PATCH**2  # values of an RGB patch
ANY_SIDE = 128  # a side of up to this many patches is allowed in every sequence that can hold it
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, on pixels in 0..1
STD = np.array([0.229, 0.224, 0.225], np.float32)


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def longest_side(length: int) -> int:
    """The most patches that a side of an image may have in a sequence of `length` patches."""
    return min(length, max(ANY_SIDE, 2 * math.isqrt(length)))


def shortest_length(count: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The shortest sequences for images of `count` patches, `side` of them along the longer side.

    This is `count`, except for panoramas: their longer side must be within `longest_side`.
    """
    return np.maximum(count, np.where(side > ANY_SIDE, ((side + 1) // 2) ** 2, 0))


def patchify(images: Sequence[np.ndarray], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images as the sequences the model reads.

    Args:
        images: uint8 [height, width, 3] RGB arrays, sides multiples of 16 (`data.geometry.resize_shape`).
        length: N; None: that of the longest image.

    Returns:
        patches uint8 [B, N, 768] and grid int32 [B, 2] (rows, columns).

    Raises:
        ValueError: an image of another type or shape, too long for `length`, or too thin for it.
    """
    if isinstance(images, np.ndarray) and images.ndim == 3 or not len(images):
        raise ValueError('patchify takes a list of images, at least one')
    images = [np.asarray(image) for image in images]
    for i, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f'image {i} is {image.dtype} {image.shape}, not uint8 [height, width, 3]')
        if image.shape[0] % PATCH or image.shape[1] % PATCH or 0 in image.shape:
            raise ValueError(
                f'image {i} is {image.shape[0]}x{image.shape[1]}: sides must be multiples of {PATCH}'
            )
    grid = np.array([image.shape[:2] for image in images], np.int32).reshape(-1, 2) // PATCH
    longest = int(grid.prod(axis=1).max())
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f'an image has {longest} patches and length is {length}')
    if grid.max() > longest_side(length):
        raise ValueError(
            f'a side of {grid.max() * PATCH} pixels is too long for {length} patches: at most '
            f'{longest_side(length) * PATCH}'
        )
    patches = np.zeros((len(images), length, PATCH_DIM), np.uint8)
    for image, (rows, columns), sequence in zip(images, grid, patches, strict=True):
        cells = image.reshape(rows, PATCH, columns, PATCH * 3).swapaxes(1, 2)  # [rows, columns, 16, 48]
        sequence[: rows * columns] = cells.reshape(rows * columns, -1)
    return patches, grid


def unpatchify(patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The image, uint8 [height, width, 3], of a sequence [N, 768] whose grid is (rows, columns)."""
    rows, columns = grid
    cells = patches[: rows * columns].reshape(rows, columns, PATCH, PATCH, 3).swapaxes(1, 2)
    return cells.reshape(rows * PATCH, columns * PATCH, 3)
