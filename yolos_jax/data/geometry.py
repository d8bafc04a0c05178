"""Where every pixel of a training image comes from, drawn before any pixel is read.

The reference (datasets/coco.py and transforms.py) flips, then either resizes, or resizes, crops and
resizes again. Its draws are made here for a whole epoch at once, as arrays over the records, from
(seed, epoch, record index) alone.
"""

import dataclasses

import numba
import numpy as np

MULTIPLE = 16  # both sides are floored to whole patches


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


def resize_shape(height, width, size, max_size):
    """The (height, width) an image is resized to, multiples of 16; works on arrays too.

    The shorter side becomes `size`, or less where the longer would pass `max_size` (None: no bound);
    then both are floored to a multiple of 16, never below 16 (`resize` of datasets/transforms.py).
    """
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    size = np.broadcast_to(np.asarray(size, np.int64), np.broadcast_shapes(height.shape, width.shape))
    short, long = np.minimum(height, width), np.maximum(height, width)
    if max_size is not None:
        too_long = long / short * size > max_size
        size = np.where(too_long, np.rint(max_size * short / long).astype(np.int64), size)
    other = size * long // short
    shape = np.stack([np.where(height <= width, size, other), np.where(height <= width, other, size)])
    shape = np.maximum(shape // MULTIPLE * MULTIPLE, MULTIPLE)
    return (int(shape[0]), int(shape[1])) if shape.ndim == 1 else (shape[0], shape[1])


def draw(heights, widths, recipe, seed, epoch):
    """The augmentation of every record in one epoch.

    Returns a dict of arrays over the n records:
        'flip' bool [n]; 'crop' bool [n], whether the image is cropped;
        'before' int32 [n, 2], the (height, width) it is resized to before the crop (its own if none);
        'box' int32 [n, 4], the crop's (top, left, height, width) in that (all of it if none);
        'shape' int32 [n, 2], the final (height, width).
    """
    n = len(heights)
    u = np.random.Generator(np.random.Philox(key=[seed, epoch])).random((n, 8))
    whole = lambda column, count: (u[:, column] * count).astype(np.int64)  # 0..count-1
    crop = u[:, 1] >= 0.5
    size = np.asarray(recipe.sizes)[whole(2, len(recipe.sizes))]

    first = np.asarray(recipe.crop_from)[whole(3, len(recipe.crop_from))]
    resized = np.stack(resize_shape(heights, widths, first, None), axis=1)
    before = np.where(crop[:, None], resized, np.stack([heights, widths], axis=1))
    sides = []
    for axis, column in ((0, 4), (1, 5)):
        high = np.minimum(before[:, axis], recipe.crop_max)
        low = np.minimum(high, recipe.crop_min)
        sides.append(np.where(crop, low + whole(column, high - low + 1), before[:, axis]))
    h, w = sides
    top, left = whole(6, before[:, 0] - h + 1), whole(7, before[:, 1] - w + 1)
    return {
        'flip': u[:, 0] < 0.5,
        'crop': crop,
        'before': before.astype(np.int32),
        'box': np.stack([top, left, h, w], axis=1).astype(np.int32),
        'shape': np.stack(resize_shape(h, w, size, recipe.max_size), axis=1).astype(np.int32),
    }


def fixed(heights, widths, size, max_size):
    """The geometry of evaluation, in the form of `draw`: a resize and nothing else."""
    before = np.stack([heights, widths], axis=1).astype(np.int32)
    n = len(before)
    return {
        'flip': np.zeros(n, bool),
        'crop': np.zeros(n, bool),
        'before': before,
        'box': np.concatenate([np.zeros((n, 2), np.int32), before], axis=1),
        'shape': np.stack(resize_shape(heights, widths, size, max_size), axis=1).astype(np.int32),
    }


def most_patches(heights, widths, recipe):
    """The most patches that any draw of any of these records can have."""
    h, w = np.asarray(heights), np.asarray(widths)
    crop = np.arange(min(recipe.crop_min, recipe.crop_max), recipe.crop_max + 1)
    most = 0
    for size in recipe.sizes:
        for shapes in (h, w), np.meshgrid(crop, crop):
            rows, columns = resize_shape(*shapes, size, recipe.max_size)
            most = max(most, int((rows // MULTIPLE * (columns // MULTIPLE)).max()))
    return most


def move_boxes(boxes, height, width, geometry):
    """Boxes (xyxy pixels of the image) after the image's geometry: cxcywh in 0..1, and which remain.

    Args:
        boxes: float32 [m, 4]; height, width: of the image; geometry: one record's row of `draw`.

    Returns:
        float32 [k, 4] and the indices [k] of the boxes the crop left with an area.
    """
    before_h, before_w = geometry['before'].tolist()
    scale = np.float32(before_w / width), np.float32(before_h / height)
    box = geometry['box'].astype(np.float32)
    return _move(np.float32(boxes), geometry['flip'], np.float32(width), *scale, box)


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
