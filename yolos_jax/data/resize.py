"""Pillow's 8-bit resize, bilinear and bicubic, bit for bit, for a part of the output only.

The published models were trained and evaluated on `Image.resize(BILINEAR)`, an antialiased triangle
filter in fixed point, and ViTs are pre-trained on BICUBIC: a horizontal pass rounded to 8 bits, then a
vertical one (Resample.c of Pillow up to 12, which turns the order in images over 100 times as tall as wide;
Pillow 13 changed it for some more shapes).
Here it is compiled by numba, runs without the GIL, and computes only the rows and columns asked for.

Images are RGBX, uint8 [height, width, 4], X is ignored: four bytes a pixel make whole vectors. Both
passes are the same sum (`mixer`) of runs of bytes that lie a step apart: the vertical one adds runs of 16
pixels of neighbouring rows, the horizontal one neighbouring pixels, of four rows at once, which are
interleaved before and de-interleaved afterwards.
"""

import functools

import numba
import numpy as np

from yolos_jax.data.mixer import BITS, make_mix
from yolos_jax.numba_cache import renamed
from yolos_jax.patches import PATCH

RUN = 4 * PATCH  # bytes of a patch's row in an RGBX image

_mix_column = make_mix(16, range(16))  # a pixel of four rows
_mix_row = make_mix(RUN, range(RUN))  # sixteen pixels of a row
_mix_patch = make_mix(RUN, [i for i in range(RUN) if i % 4 != 3])  # the same without X


@functools.lru_cache(maxsize=4096)
def _weights(size_in: int, size_out: int, cubic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First tap, number of taps and fixed-point weights of every output sample of an axis."""
    scale = size_in / size_out
    unit = max(scale, 1.0)
    stretch = 2 * unit if cubic else unit
    centre = (np.arange(size_out) + 0.5) * scale
    first = np.maximum((centre - stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + stretch + 0.5).astype(np.int64), size_in)
    taps = int((last - first).max())
    offset = np.arange(taps)
    place = first[:, None] + offset
    distance = np.abs((place - centre[:, None] + 0.5) * (1 / unit))
    weight = _cubic(distance) if cubic else np.maximum(1 - distance, 0)
    weight = np.where(place < last[:, None], weight, 0)
    total = np.zeros(size_out)
    for tap in range(taps):  # summed in Pillow's order: the rounding of the sum matters
        total += weight[:, tap]
    fixed = weight / total[:, None] * (1 << BITS)
    fixed = (fixed + np.copysign(0.5, fixed)).astype(np.int32)
    return first, last - first, fixed


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with -0.5 at distances x, in Pillow's order of operations."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@numba.njit(nogil=True, cache=True)
@renamed
def _horizontal(image, first, count, weights, flip, out):
    """From and to uint32 images, in blocks of four rows; the last block repeats the last row if needed."""
    height, size = image.shape
    width = out.shape[1]
    interleaved, mixed = np.empty(size * 4, np.uint32), np.empty(width * 4, np.uint32)
    data, to = interleaved.view(np.uint8), mixed.view(np.uint8)
    step = -16 if flip else 16
    for y in range(0, height, 4):
        y1, y2, y3 = min(y + 1, height - 1), min(y + 2, height - 1), min(y + 3, height - 1)
        a, b, c, d = image[y], image[y1], image[y2], image[y3]
        for x in range(size):
            i = 4 * x
            interleaved[i], interleaved[i + 1] = a[x], b[x]
            interleaved[i + 2], interleaved[i + 3] = c[x], d[x]
        for x in range(width):
            start = size - 1 - first[x] if flip else first[x]
            _mix_column(data, start * 16, step, weights[x], count[x], to, x * 16)
        a, b, c, d = out[y], out[y1], out[y2], out[y3]
        for x in range(width):
            a[x], b[x], c[x], d[x] = mixed[4 * x], mixed[4 * x + 1], mixed[4 * x + 2], mixed[4 * x + 3]


@numba.njit(nogil=True, cache=True)
@renamed
def _vertical(data, first, count, weights, stride, out):
    """From the bytes of an image to those of another. Both have a tail, as runs may pass a row's end."""
    for y in range(len(first)):
        for x in range(0, stride, RUN):
            _mix_row(data, first[y] * stride + x, stride, weights[y], count[y], out, y * stride + x)


@numba.njit(nogil=True, cache=True)
@renamed
def _vertical_patches(data, first, count, weights, columns, out):
    """As `_vertical`, to the bytes of patches, [rows, columns, 16, 48], without a tail."""
    stride = columns * RUN
    for y in range(len(first)):
        patch, inside = y // PATCH * columns, y % PATCH
        for column in range(columns):
            to = ((patch + column) * PATCH + inside) * 3 * PATCH
            _mix_patch(data, first[y] * stride + column * RUN, stride, weights[y], count[y], out, to)


def _rows(
    image: np.ndarray, shape: tuple[int, int], box: tuple, *, flip: bool, cubic: bool = False
) -> tuple:
    """The horizontal pass: the bytes of the rows that `box` needs, and the taps of the vertical pass."""
    (height, width), (top, left, h, w) = shape, box
    first, count, weights = (values[top : top + h] for values in _weights(len(image), height, cubic))
    low, high = first[0], first[-1] + count[-1]
    columns = (values[left : left + w] for values in _weights(image.shape[1], width, cubic))
    data = np.empty((high - low) * w * 4 + RUN, np.uint8)
    rows = data[:-RUN].view(np.uint32).reshape(-1, w)
    _horizontal(image[low:high].view(np.uint32)[..., 0], *columns, flip, rows)
    return data, first - low, count, weights


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    box: tuple | None = None,
    flip: bool = False,
    cubic: bool = False,
) -> np.ndarray:
    """An RGBX image resized to (height, width), or the part of that in `box`.

    box: (top, left, height, width) in the resized image; None for all of it. flip: mirror the image
    first (the weights are not symmetric to the last bit, so mirroring afterwards is not the same). cubic:
    bicubic instead of bilinear.
    """
    box = (0, 0, height, width) if box is None else box
    h, w = box[2:]
    out = np.empty(h * w * 4 + RUN, np.uint8)
    _vertical(*_rows(image, (height, width), box, flip=flip, cubic=cubic), w * 4, out)
    return out[:-RUN].reshape(h, w, 4)


def resize_to_patches(image: np.ndarray, height: int, width: int, *, flip: bool, out: np.ndarray) -> None:
    """As `resize`, to multiples of 16, written as the RGB of patches: out uint8 [patches, 768]."""
    rows = _rows(image, (height, width), (0, 0, height, width), flip=flip)
    _vertical_patches(*rows, width // PATCH, out.reshape(-1))
