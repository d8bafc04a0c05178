"""Pillow's 8-bit bilinear resize, bit for bit, for a part of the output only.

The published models were trained and evaluated on `Image.resize(BILINEAR)`, an antialiased triangle
filter in fixed point: a horizontal pass rounded to 8 bits, then a vertical one (Resample.c of Pillow
up to 12; Pillow 13 changed the order of the passes for some shapes). Here it is compiled by numba,
runs without the GIL, and computes only the rows and columns asked for.

Images are RGBX, uint8 [height, width, 4], X being anything: four bytes a pixel make whole vectors. Both
passes are the same sum, of runs of bytes that lie a step apart: the vertical one adds runs of 16 pixels of
neighbouring rows, the horizontal one neighbouring pixels, of four rows at once, which are woven together
before and parted afterwards.
"""

import functools

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BITS = 22  # fixed-point precision of the weights: 32 - 8 - 2
SIDE = 16  # of a patch
RUN = 4 * SIDE  # bytes of a patch's row in an RGBX image


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
    fixed = (weight / total[:, None] * (1 << BITS) + 0.5).astype(np.uint32)
    return first, last - first, fixed


def _mixer(lanes, kept):
    """The sum at the heart of both passes, on vectors of `lanes` bytes, storing those in `kept`.

    numba cannot be made to use vectors here (it must assume that `out` and `data` overlap), so this is
    written in LLVM's own language, for all processors alike.
    """
    bytes_in, bytes_out = ir.VectorType(ir.IntType(8), lanes), ir.VectorType(ir.IntType(8), len(kept))
    i32, sums = ir.IntType(32), ir.VectorType(ir.IntType(32), lanes)
    all_lanes = lambda value: ir.Constant(sums, [value] * lanes)
    nothing = ir.Constant(sums, ir.Undefined)

    @intrinsic
    def mix(typing, data, at, step, weights, taps, out, to):
        """out[to :] = (sum over k < taps of weights[k] * data[at + k * step :]) rounded to 8 bits."""

        def build(context, builder, signature, values):
            arrays = [context.make_array(signature.args[i])(context, builder, values[i]) for i in (0, 3, 5)]
            data, weights, out = (array.data for array in arrays)
            _, at, step, _, taps, _, to = values
            number = lambda k: ir.Constant(taps.type, k)
            total = cgutils.alloca_once_value(builder, all_lanes(1 << (BITS - 1)))

            def add(k):
                place = builder.gep(data, [builder.add(at, builder.mul(k, step))])
                run = builder.load(builder.bitcast(place, bytes_in.as_pointer()), align=1)
                weight = builder.load(builder.gep(weights, [k]))
                weight = builder.insert_element(nothing, weight, ir.Constant(i32, 0))
                weight = builder.shuffle_vector(weight, nothing, all_lanes(0))
                product = builder.mul(builder.zext(run, sums), weight)
                builder.store(builder.add(builder.load(total), product), total)

            add(number(0))
            with builder.if_then(builder.icmp_signed('>', taps, number(1))):
                add(number(1))
                with cgutils.for_range_slice(builder, number(2), taps, number(1)) as (k, _):
                    add(k)
            result = builder.trunc(builder.lshr(builder.load(total), all_lanes(BITS)), bytes_in)
            order = ir.Constant(ir.VectorType(i32, len(kept)), list(kept))
            result = builder.shuffle_vector(result, ir.Constant(bytes_in, ir.Undefined), order)
            place = builder.bitcast(builder.gep(out, [to]), bytes_out.as_pointer())
            builder.store(result, place, align=1)
            return context.get_dummy_value()

        return types.void(data, at, step, weights, taps, out, to), build

    return mix


_mix_column = _mixer(16, range(16))  # a pixel of four rows
_mix_row = _mixer(RUN, range(RUN))  # sixteen pixels of a row
_mix_patch = _mixer(RUN, [i for i in range(RUN) if i % 4 != 3])  # the same without X


@numba.njit(nogil=True, cache=True)
def _horizontal(image, first, count, weights, flip, out):
    """From and to uint32 images, whose last rows of a block of four may be fewer."""
    height, size = image.shape
    width = out.shape[1]
    woven, mixed = np.empty(size * 4, np.uint32), np.empty(width * 4, np.uint32)
    data, to = woven.view(np.uint8), mixed.view(np.uint8)
    step = -16 if flip else 16
    for y in range(0, height, 4):
        y1, y2, y3 = min(y + 1, height - 1), min(y + 2, height - 1), min(y + 3, height - 1)
        a, b, c, d = image[y], image[y1], image[y2], image[y3]
        for x in range(size):
            woven[4 * x], woven[4 * x + 1], woven[4 * x + 2], woven[4 * x + 3] = a[x], b[x], c[x], d[x]
        for x in range(width):
            start = size - 1 - first[x] if flip else first[x]
            _mix_column(data, start * 16, step, weights[x], count[x], to, x * 16)
        a, b, c, d = out[y], out[y1], out[y2], out[y3]
        for x in range(width):
            a[x], b[x], c[x], d[x] = mixed[4 * x], mixed[4 * x + 1], mixed[4 * x + 2], mixed[4 * x + 3]


@numba.njit(nogil=True, cache=True)
def _vertical(data, first, count, weights, stride, out):
    """From the bytes of an image to those of another. Rows end with a whole run, so both have a tail."""
    for y in range(len(first)):
        for x in range(0, stride, RUN):
            _mix_row(data, first[y] * stride + x, stride, weights[y], count[y], out, y * stride + x)


@numba.njit(nogil=True, cache=True)
def _vertical_patches(data, first, count, weights, columns, out):
    """The same to the bytes of patches, [rows, columns, 16, 48], without a tail."""
    stride = columns * RUN
    for y in range(len(first)):
        patch, inside = y // SIDE * columns, y % SIDE
        for column in range(columns):
            to = ((patch + column) * SIDE + inside) * 3 * SIDE
            _mix_patch(data, first[y] * stride + column * RUN, stride, weights[y], count[y], out, to)


def _rows(image, height, width, box, flip):
    """After the horizontal pass: the bytes of the rows `box` needs, and how the vertical one mixes them."""
    top, left, h, w = box
    first, count, weights = (values[top : top + h] for values in _weights(len(image), height))
    low, high = first[0], first[-1] + count[-1]
    columns = (values[left : left + w] for values in _weights(image.shape[1], width))
    data = np.empty((high - low) * w * 4 + RUN, np.uint8)
    rows = data[:-RUN].view(np.uint32).reshape(-1, w)
    _horizontal(image[low:high].view(np.uint32)[..., 0], *columns, flip, rows)
    return data, first - low, count, weights


def resize(image, height, width, box=None, flip=False):
    """An RGBX image resized to (height, width), or the part of that in `box`.

    box: (top, left, height, width) in the resized image; None for all of it. flip: mirror the image
    first (the weights are not symmetric to the last bit, so mirroring afterwards is not the same).
    """
    box = (0, 0, height, width) if box is None else box
    h, w = box[2:]
    out = np.empty(h * w * 4 + RUN, np.uint8)
    _vertical(*_rows(image, height, width, box, flip), w * 4, out)
    return out[:-RUN].reshape(h, w, 4)


def resize_to_patches(image, height, width, flip, out):
    """As `resize`, to multiples of 16, written as the RGB of patches: out uint8 [patches, 768]."""
    rows = _rows(image, height, width, (0, 0, height, width), flip)
    _vertical_patches(*rows, width // SIDE, out.reshape(-1))
