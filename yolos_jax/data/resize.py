"""Pillow's 8-bit bilinear resize, bit for bit, for a part of the output only.

The published models were trained and evaluated on `Image.resize(BILINEAR)`, an antialiased triangle
filter in fixed point: a horizontal pass rounded to 8 bits, then a vertical one (Resample.c of Pillow
up to 12; Pillow 13 changed the order of the passes for some shapes). Here it is compiled by numba,
runs without the GIL, and computes only the rows and columns asked for.
"""

import functools

import numba
import numpy as np

BITS = 22  # fixed-point precision of the weights: 32 - 8 - 2


@functools.lru_cache(maxsize=4096)
def _weights(size_in, size_out):
    """First tap, number of taps and fixed-point weights of every output sample of an axis."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + stretch + 0.5).astype(np.int64), size_in)
    taps = int((last - first).max())
    offset = np.arange(taps)
    place = first[:, None] + offset
    weight = np.maximum(1 - np.abs((place - centre[:, None] + 0.5) * (1 / stretch)), 0)
    weight = np.where(place < last[:, None], weight, 0)
    total = np.zeros(size_out)
    for tap in range(taps):  # summed in Pillow's order: the rounding of the sum matters
        total += weight[:, tap]
    fixed = (weight / total[:, None] * (1 << BITS) + 0.5).astype(np.int32)
    return first.astype(np.int32), (last - first).astype(np.int32), fixed


@numba.njit(nogil=True, cache=True)
def _horizontal(image, flip, first, count, weights, left, out):
    last = image.shape[1] - 1
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            start, step = first[left + x], 1
            if flip:
                start, step = last - start, -1
            r = g = b = 1 << (BITS - 1)
            for k in range(count[left + x]):
                w = weights[left + x, k]
                r += w * image[y, start, 0]
                g += w * image[y, start, 1]
                b += w * image[y, start, 2]
                start += step
            out[y, x, 0] = r >> BITS
            out[y, x, 1] = g >> BITS
            out[y, x, 2] = b >> BITS


@numba.njit(nogil=True, cache=True)
def _vertical(rows, offset, first, count, weights, top, out):
    sums = np.empty(out.shape[1], np.int32)
    for y in range(out.shape[0]):
        start = first[top + y] - offset
        sums[:] = 1 << (BITS - 1)
        for k in range(count[top + y]):
            w = weights[top + y, k]
            row = rows[start + k]
            for x in range(out.shape[1]):
                sums[x] += w * row[x]
        for x in range(out.shape[1]):
            out[y, x] = sums[x] >> BITS


def resize(image, height, width, box=None, flip=False):
    """A uint8 [h, w, 3] image resized to (height, width), or the part of that in `box`.

    box: (top, left, height, width) in the resized image; None for all of it. flip: mirror the image
    first (the weights are not symmetric to the last bit, so mirroring afterwards is not the same).
    """
    top, left, h, w = (0, 0, height, width) if box is None else box
    in_h, in_w, _ = image.shape
    y_first, y_count, y_weights = _weights(in_h, height)
    low, high = y_first[top], y_first[top + h - 1] + y_count[top + h - 1]
    if in_h == height:
        low, high = top, top + h
    rows = image[low:high]
    if in_w == width:
        rows = rows[:, ::-1] if flip else rows
        rows = np.ascontiguousarray(rows[:, left : left + w])
    else:
        wide = np.empty((high - low, w, 3), np.uint8)
        _horizontal(np.ascontiguousarray(rows), flip, *_weights(in_w, width), left, wide)
        rows = wide
    if in_h == height:
        return rows
    out = np.empty((h, w * 3), np.uint8)
    _vertical(rows.reshape(len(rows), -1), low, y_first, y_count, y_weights, top, out)
    return out.reshape(h, w, 3)
