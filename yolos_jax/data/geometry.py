"""Random flip, crop and resize, drawn from image sizes alone.

The reference (datasets/coco.py and transforms.py) flips, then either resizes, or resizes, crops and
resizes again. Its draws are made here for a whole epoch at once, as arrays over the records, from
(seed, epoch, record index) alone and before any pixel is read.
"""

import dataclasses
from collections.abc import Mapping

import numba
import numpy as np

from yolos_jax.data.streams import Stream, generator
from yolos_jax.patches import PATCH, shortest_length


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The train-time geometry of a model.

    sizes: shorter sides to choose from; max_size: bound of the longer side;
    crop_from: shorter sides to choose from before a crop; crop_min, crop_max: bounds of its sides.
    All in pixels.
    """

    sizes: tuple
    max_size: int
    crop_from: tuple = (400, 500, 600)
    crop_min: int = 384
    crop_max: int = 600

    @classmethod
    def from_fields(cls, fields: Mapping, size: int = 800, max_size: int = 1333) -> 'Recipe':
        """The recipe with these fields; without sizes among them, the published one scaled to `size`."""
        if not fields['sizes']:
            return cls.published(size, max_size)
        return cls(**{**fields, 'max_size': fields['max_size'] or max_size})

    @classmethod
    def published(cls, size: int = 800, max_size: int = 1333) -> 'Recipe':
        """The recipe of YOLOS-S, S (dWr) and B, scaled to images of another size."""
        scaled = lambda side: max(round(side * size / 800), PATCH)
        return cls(
            sizes=tuple(range(scaled(480) // PATCH * PATCH, size + 1, PATCH)),
            max_size=max_size,
            crop_from=tuple(map(scaled, cls.crop_from)),
            crop_min=scaled(cls.crop_min),
            crop_max=scaled(cls.crop_max),
        )


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the pixels of n images come from; `geometry[i]` is that of image i, without the leading n.

    flip bool [n]; crop bool [n], whether the image is cropped; before int32 [n, 2], the (height, width) it
    is resized to before the crop (its own if none); box int32 [n, 4], the crop's (top, left, height,
    width) in that (all of it if none); shape int32 [n, 2], the final (height, width).
    """

    flip: np.ndarray
    crop: np.ndarray
    before: np.ndarray
    box: np.ndarray
    shape: np.ndarray

    def __getitem__(self, i: int) -> 'Geometry':
        return Geometry(self.flip[i], self.crop[i], self.before[i], self.box[i], self.shape[i])

    @property
    def grid(self) -> np.ndarray:
        """The final (rows, columns) in patches, int32 [n, 2]."""
        return self.shape // PATCH

    @property
    def lengths(self) -> np.ndarray:
        """The shortest sequence for each image, [n]: its number of patches, except for panoramas."""
        return shortest_length(self.counts, self.grid.max(axis=-1))

    @property
    def counts(self) -> np.ndarray:
        """How many patches each image has, [n]."""
        return self.shape.prod(axis=-1) // PATCH**2


def resize_shape(
    height: int | np.ndarray, width: int | np.ndarray, size: int | np.ndarray, max_size: int | None
) -> tuple:
    """The (height, width) an image is resized to, multiples of 16; works on arrays too.

    The shorter side becomes `size`, or less if the longer would exceed `max_size` (None: no bound; as in
    the reference it is exceeded where the shorter side is a few pixels, of images a hundred times as long);
    then both are floored to a multiple of 16, never below 16 (`resize` of datasets/transforms.py).
    """
    height, width, size = (np.asarray(x, np.int64) for x in (height, width, size))
    short, long = np.minimum(height, width), np.maximum(height, width)
    if max_size is not None:
        too_long = long / short * size > max_size
        size = np.where(too_long, np.rint(max_size * short / long).astype(np.int64), size)
    other = size * long // short
    shape = np.stack([np.where(height <= width, size, other), np.where(height <= width, other, size)])
    shape = np.maximum(shape // PATCH * PATCH, PATCH)
    return (int(shape[0]), int(shape[1])) if shape.ndim == 1 else (shape[0], shape[1])


def draw(heights: np.ndarray, widths: np.ndarray, recipe: Recipe, seed: int, epoch: int) -> Geometry:
    """The augmentation of every record in one epoch."""
    uniform = generator(Stream.GEOMETRY, seed, epoch).random((len(heights), 8))
    flip, crop, size, crop_from, crop_height, crop_width, crop_top, crop_left = uniform.T
    whole = lambda u, count: (u * count).astype(np.int64)  # 0..count-1
    crop = crop >= 0.5

    first = np.asarray(recipe.crop_from)[whole(crop_from, len(recipe.crop_from))]
    resized = np.stack(resize_shape(heights, widths, first, None), axis=1)
    before = np.where(crop[:, None], resized, np.stack([heights, widths], axis=1))

    def side(u: np.ndarray, available: np.ndarray) -> np.ndarray:
        high = np.minimum(available, recipe.crop_max)
        low = np.minimum(high, recipe.crop_min)
        return np.where(crop, low + whole(u, high - low + 1), available)

    h, w = side(crop_height, before[:, 0]), side(crop_width, before[:, 1])
    top, left = whole(crop_top, before[:, 0] - h + 1), whole(crop_left, before[:, 1] - w + 1)
    size = np.asarray(recipe.sizes)[whole(size, len(recipe.sizes))]
    return Geometry(
        flip=flip < 0.5,
        crop=crop,
        before=before.astype(np.int32),
        box=np.stack([top, left, h, w], axis=1).astype(np.int32),
        shape=np.stack(resize_shape(h, w, size, recipe.max_size), axis=1).astype(np.int32),
    )


def fixed(heights: np.ndarray, widths: np.ndarray, size: int, max_size: int) -> Geometry:
    """The geometry of evaluation: a resize and nothing else."""
    before = np.stack([heights, widths], axis=1).astype(np.int32)
    n = len(before)
    return Geometry(
        flip=np.zeros(n, bool),
        crop=np.zeros(n, bool),
        before=before,
        box=np.concatenate([np.zeros((n, 2), np.int32), before], axis=1),
        shape=np.stack(resize_shape(heights, widths, size, max_size), axis=1).astype(np.int32),
    )


def most_patches(heights: np.ndarray, widths: np.ndarray, recipe: Recipe) -> int:
    """The most patches that any draw of any of these records can have."""
    h, w = np.asarray(heights), np.asarray(widths)
    narrowest = max(min(recipe.crop_from) // PATCH * PATCH, PATCH)  # shortest side before a crop
    crop = np.arange(min(recipe.crop_min, recipe.crop_max, narrowest), recipe.crop_max + 1)
    most = 0
    for size in recipe.sizes:
        for shapes in (h, w), np.meshgrid(crop, crop):
            rows, columns = (side // PATCH for side in resize_shape(*shapes, size, recipe.max_size))
            most = max(most, int(shortest_length(rows * columns, np.maximum(rows, columns)).max()))
    return most


def move_boxes(
    boxes: np.ndarray, height: int, width: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (xyxy pixels of the image) after the image's geometry: cxcywh in 0..1, and which remain.

    Args:
        boxes: float32 [m, 4]; height, width: of the image; geometry: of one image.

    Returns:
        float32 [k, 4] and the indices [k] of the boxes the crop left with an area.
    """
    before_h, before_w = geometry.before.tolist()
    scale = np.float32(before_w / width), np.float32(before_h / height)
    return _move(
        np.float32(boxes), geometry.flip, np.float32(width), *scale, geometry.box.astype(np.float32)
    )


@numba.njit(nogil=True, cache=True)
def _move(boxes, flip, width, scale_x, scale_y, crop):
    out, kept, k = np.empty_like(boxes), np.empty(len(boxes), np.int64), 0
    top, left, h, w = crop
    zero, two = np.float32(0), np.float32(2)
    for i in range(len(boxes)):
        x0, y0, x1, y1 = boxes[i]
        if flip:
            x0, x1 = width - x1, width - x0
        x0, x1 = min(max(x0 * scale_x - left, zero), w), min(max(x1 * scale_x - left, zero), w)
        y0, y1 = min(max(y0 * scale_y - top, zero), h), min(max(y1 * scale_y - top, zero), h)
        if x1 > x0 and y1 > y0:
            x0, y0, x1, y1 = x0 / w, y0 / h, x1 / w, y1 / h
            out[k, 0], out[k, 1], out[k, 2], out[k, 3] = (x0 + x1) / two, (y0 + y1) / two, x1 - x0, y1 - y0
            kept[k] = i
            k += 1
    return out[:k], kept[:k]
