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


@functools.lru_cache(maxsize=4096)
def _taps(size_in, size_out, flip):
    """The same tap by tap, [taps, size_out]: where each output sample's k-th tap is, and its weight."""
    first, _, weights = _weights(size_in, size_out)
    taps = np.arange(weights.shape[1])[:, None]
    place = np.minimum(first + taps, size_in - 1)  # what lies past the end weighs nothing
    place = size_in - 1 - place if flip else place
    return place.astype(np.uint64), np.ascontiguousarray(weights.T)


@numba.njit(nogil=True, cache=True)
def _horizontal(image, place, weights, out):
    """A pixel is one int32 and a loop runs along the row, so that the compiler can use vectors."""
    taps, width = place.shape
    byte, green, blue, bits = np.int32(255), np.int32(8), np.int32(16), np.int32(BITS)
    packed = np.empty(image.shape[1], np.int32)
    taken = np.empty(width, np.int32)
    r, g, b = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    for y in range(out.shape[0]):
        row, to = image[y], out[y]
        for x in range(packed.size):
            packed[x] = np.int32(row[x, 0]) | np.int32(row[x, 1]) << green | np.int32(row[x, 2]) << blue
        r[:] = g[:] = b[:] = np.int32(1 << (BITS - 1))
        for k in range(taps):
            places, w = place[k], weights[k]
            for x in range(width):
                taken[x] = packed[places[x]]
            for x in range(width):
                p = taken[x]
                r[x] += w[x] * (p & byte)
                g[x] += w[x] * ((p >> green) & byte)
                b[x] += w[x] * (p >> blue)
        for x in range(width):
            to[x, 0] = r[x] >> bits
            to[x, 1] = g[x] >> bits
            to[x, 2] = b[x] >> bits


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
        taps = (np.ascontiguousarray(x[:, left : left + w]) for x in _taps(in_w, width, flip))
        _horizontal(np.ascontiguousarray(rows), *taps, wide)
        rows = wide
    if in_h == height:
        return rows
    out = np.empty((h, w * 3), np.uint8)
    _vertical(rows.reshape(len(rows), -1), low, y_first, y_count, y_weights, top, out)
    return out.reshape(h, w, 3)
