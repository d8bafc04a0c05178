"""Attention on a CPU, compiled by Numba: the steps that `flash` and `flash_backward` share.

A tile is up to TILE queries, of which ROWS are computed at a time; a group is up to GROUP keys. Products
read copies of k and v that are in order: "panels" are COLUMNS rows each, transposed.

Letters: B batch, H heads, M queries, N keys, d head width, D d rounded up to COLUMNS, n real keys. Arrays
have one dimension. q, k, v, the output and their gradients are [B, M or N, H, d] in memory, as the dense
layers before and after have them; `step` is H * d, from one token to the next.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from numba import njit

from yolos_jax.kernels import vectors, xla
from yolos_jax.kernels.vectors import COLUMNS, HALVES, LANES, ROWS
from yolos_jax.numba_cache import renamed

TILE = 48  # queries; a multiple of ROWS
GROUP = 192  # keys; a multiple of ROWS and COLUMNS
STRIDE = GROUP + 16  # between the rows of a group's scores: a power of 2 would share few lines of the cache
LAYOUT = 0, 2, 1, 3  # of [B, H, M, d] in memory
ONE, ZERO = np.float32(1), np.float32(0)
# sums may be reordered, so that they are vectorised; infinities and NaN keep their meaning
FASTMATH = {'nsz', 'contract', 'reassoc'}


def compiled(function: Callable) -> Callable:
    """Compile a function for the kernels.

    A division by 0 gives an infinity or NaN: an exception would end a unit of work that its call waits for.
    """
    return njit(nogil=True, cache=True, error_model='numpy', fastmath=FASTMATH)(renamed(function))


@compiled
def count(size, multiple):
    """How many parts of `multiple` make up `size`, the last of them perhaps in part."""
    return (size + multiple - 1) // multiple


@compiled
def sizes(frame):
    """B, H, M, N, d and D of a call whose first arguments are q and k."""
    arguments = xla.arguments(frame)
    of_q, of_k = xla.shape(arguments[0]), xla.shape(arguments[1])
    d = of_q[3]
    return of_q[0], of_q[1], of_q[2], of_k[2], d, count(d, COLUMNS) * COLUMNS


@compiled
def start(head, H, rows, d):
    """Where head `head` of B * H begins in an array [B, rows, H, d]."""
    return (head // H * rows * H + head % H) * d


@compiled
def copy(x, at, step, rows, d, scale, out, width, size):
    """out = rows of x from `at` on, times `scale`, a row in `width` numbers; the rest of `size` is 0."""
    for r in range(rows):
        source, target = x[at + r * step :], out[r * width :]
        for c in range(d):
            target[c] = source[c] * scale
        for c in range(d, width):
            target[c] = 0
    for i in range(rows * width, size):
        out[i] = 0


@compiled
def copy_back(x, width, rows, all_rows, d, out, at, step):
    """The rows of x, `width` numbers each, to out from `at` on; zeros from there to `all_rows`."""
    for r in range(rows):
        source, target = x[r * width :], out[at + r * step :]
        for c in range(d):
            target[c] = source[c]
    for r in range(rows, all_rows):
        target = out[at + r * step :]
        for c in range(d):
            target[c] = 0


@compiled
def copy_to_panels(x, at, step, rows, d, panels):
    """Rows of x from `at` on, in panels; the last panel is filled with its last row."""
    for first in range(0, rows, COLUMNS):
        whole = d // LANES * LANES if first + COLUMNS <= rows else 0
        for half in HALVES:
            row, panel = at + (first + half) * step, first * d + half
            for c in range(0, whole, LANES):
                vectors.transpose(x, row + c, step, panels, panel + c * COLUMNS, COLUMNS)
        for j in range(COLUMNS):
            source, target = x[at + min(first + j, rows - 1) * step :], panels[first * d + j :]
            for c in range(whole, d):
                target[c * COLUMNS] = source[c]


@compiled
def scores(x, rows, D, panels, first, columns, d, out, stride):
    """out [rows, columns] = x [rows, D] @ panels, from column `first` of the panels on."""
    for c in range(0, columns, COLUMNS):
        for r in range(0, rows, ROWS):
            panel, place = (first + c) * d, r * stride + c
            vectors.product(x, r * D, D, 1, panels, panel, COLUMNS, d, out, place, stride)


@compiled
def add_product(x, at, rows, stride, terms, y, first, D, out):
    """out [rows, D] += x [rows, terms] @ y [terms, D], x from `at` and y from `first` on."""
    for c in range(0, D, COLUMNS):
        for r in range(0, rows, ROWS):
            vectors.add_product(x, at + r * stride, stride, 1, y, first + c, D, terms, out, r * D + c, D)


@compiled
def add_transposed(x, rows, columns, y, D, out, at):
    """out [columns, D] += x^T @ y, x [rows, columns], y [rows, D]; up to ROWS - 1 rows more change."""
    for n in range(0, columns, ROWS):
        for c in range(0, D, COLUMNS):
            vectors.add_product(x, n, 1, STRIDE, y, c, D, rows, out, at + n * D + c, D)


def call(name: str, results: Sequence[jax.ShapeDtypeStruct], *args: jax.Array) -> tuple:
    """Call the function that is registered under a name, in an XLA program for a CPU."""
    inputs, outputs = ([LAYOUT if x.ndim == 4 else None for x in arrays] for arrays in (args, results))
    function = jax.ffi.ffi_call(
        name, results, input_layouts=inputs, output_layouts=outputs, vmap_method='sequential'
    )
    return tuple(function(*args))
