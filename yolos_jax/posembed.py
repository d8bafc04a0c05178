"""Position tables, resampled to each image's own grid exactly as torch's bicubic does.

Images of one batch have grids of different shapes, so a table [gh, gw, D] is resampled inside jit, from
the traced grids, to sequences of N patches.

With the attention kernel of CPUs each patch sums the sixteen rows of the table around it (`taps`,
`from_taps`): a forward pass of YOLOS-S takes 0.92 of the time that it takes in the other way. Else the
table is multiplied by two small dense matrices, one per axis (`layout`, `sequences`). XLA needs static
shapes, so that product is taken for every cell of `short x long` (the shorter and the longer side an image
of N patches can have), and each patch then picks its cell.

Letters: B batch, N patches of the longest sequence, P tokens before them, S short side, L long side,
D width.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import attention, ops
from yolos_jax.patches import longest_side, round_up

ALIGNED = 8  # summed axes are padded to a multiple of it: a GPU reads 16 bytes at a time
CUBIC = -0.75  # torch's coefficient; PIL's and jax.image's is -0.5


def bicubic_matrix(size_in: int, size_out: int | jax.Array, rows: int) -> jax.Array:
    """The matrix [rows, size_in] that resamples an axis of `size_in` to `size_out` samples.

    `size_out` may be traced; rows from `size_out` on are padding.
    """
    samples, weights = _four_taps(size_in, size_out, jnp.arange(rows))
    hot = jax.nn.one_hot(samples, size_in)  # [rows, 4, size_in]
    return jnp.einsum('rk,rki->ri', weights, hot, precision='highest')


def _four_taps(size_in: int, size_out: int | jax.Array, place: jax.Array) -> tuple:
    """The four samples of an axis of `size_in`, and their weights, for places of one of `size_out`.

    torch's `interpolate(mode='bicubic', align_corners=False)`: half-pixel centres, clamped borders, no
    antialias. The source coordinate is rounded once, as ATen's fused multiply-add does: a plain product
    followed by a subtraction is off by up to 3e-6 of a table's values, this by 1e-7.
    """
    centre = place.astype(jnp.float32) + 0.5
    scale = jnp.float32(size_in) / jnp.asarray(size_out, jnp.float32)
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(0xFFFFF000)
    head = jax.lax.bitcast_convert_type(bits, jnp.float32)  # 12 bits: head * centre is exact
    source = (head * centre - 0.5) + (scale - head) * centre
    first = jnp.floor(source)
    weights = jnp.stack(_cubic(source - first, lambda a, b, c: a * b + c), axis=-1)
    samples = first.astype(jnp.int32)[..., None] + jnp.arange(-1, 3)
    return jnp.clip(samples, 0, size_in - 1), weights


def sine(grid: tuple[int, int], width: int) -> np.ndarray:
    """A fixed table [rows * columns, D] for training from scratch (arXiv 2104.02057).

    A ViT learns where its patches are far sooner from sines than from noise. Its wavelengths, up to
    200 pi patches, and its strength, twice that of the patch tokens, suit grids of 5 to 100 patches.
    """
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1, 1)
    angle = 100 ** -np.linspace(0, 1, width // 4)
    waves = [f(place * angle) for place in (rows, columns) for f in (np.sin, np.cos)]
    table = 2 * np.concatenate(waves, axis=1)
    return np.pad(table, ((0, 0), (0, width % 4))).astype(np.float32)


def _cubic(t: jax.Array, fma: Callable) -> tuple:
    """Keys' weights of the four taps around a source `t` past the second one; fma(a, b, c): a * b + c."""
    near = lambda x: fma(fma(CUBIC + 2, x, -(CUBIC + 3)) * x, x, 1)
    far = lambda x: fma(fma(fma(CUBIC, x, -5 * CUBIC), x, 8 * CUBIC), x, -4 * CUBIC)
    return far(t + 1), near(t), near(1 - t), far((1 - t) + 1)


def resample(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A table [gh, gw, D] resampled to (rows, columns) when weights are loaded: numpy [rows, columns, D].

    Every rounding is where ATen has it: within 1e-6 of torch for tables of deviation 1, where
    `bicubic_matrix` is within 4e-6.
    """

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    def matrix(size_in: int, size_out: int) -> np.ndarray:
        source = fma(np.float32(size_in) / np.float32(size_out), np.arange(size_out) + 0.5, -0.5)
        first = np.floor(source)
        weights = np.zeros((size_out, size_in))
        for k, weight in enumerate(_cubic(source - first, fma)):
            tap = np.clip(first.astype(int) + k - 1, 0, size_in - 1)
            weights[np.arange(size_out), tap] += weight
        return weights

    rows, columns = (matrix(*sizes) for sizes in zip(table.shape, grid, strict=False))
    return np.einsum('ri,cj,ijd->rcd', rows, columns, table, optimize=True).astype(np.float32)


def with_grid(table: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """A table [..., 1 + rows * columns + Q, D] with its patches resampled from a grid to another."""
    flat, end = table.reshape(-1, *table.shape[-2:]), 1 + old[0] * old[1]
    patches = [resample(one[1:end].reshape(*old, -1), new).reshape(new[0] * new[1], -1) for one in flat]
    result = np.concatenate([flat[:, :1], np.stack(patches), flat[:, end:]], axis=1)
    return result.reshape(*table.shape[:-2], *result.shape[1:])


def taps(table_grid: tuple[int, int], grid: jax.Array, length: int) -> tuple:
    """The rows and columns by which `from_taps` resamples a table to the images' grids [B, 2].

    Returns:
        (rows, their weights, columns, their weights), each [B, N, 4]. The weights of padding are 0.
    """
    (gh, gw), patch = table_grid, jnp.arange(length)
    h, w = grid[:, :1], grid[:, 1:]
    is_patch = (patch < h * w)[..., None]
    rows, of_rows = _four_taps(gh, h, patch // w)
    columns, of_columns = _four_taps(gw, w, patch % w)
    return rows, jnp.where(is_patch, of_rows, 0), columns, jnp.where(is_patch, of_columns, 0)


def from_taps(
    special: jax.Array, table: jax.Array, taps: tuple, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """As `sequences`, from the result of `taps`; only the result is of `dtype`, sums are float32."""
    rows, of_rows, columns, of_columns = taps
    table = jnp.asarray(table)  # NumPy's have no `at`

    def along_row(i: int) -> jax.Array:  # columns first, as torch
        samples = (table.at[rows[..., i], columns[..., j]].get(mode='promise_in_bounds') for j in range(4))
        return sum(of_columns[..., j, None] * sample for j, sample in enumerate(samples))

    patches = sum(of_rows[..., i, None] * along_row(i) for i in range(4))
    special = ops.repeat(special, patches.shape[0])
    return jnp.concatenate([special, patches], axis=1).astype(dtype)


def layout(table_grid: tuple[int, int], grid: jax.Array, length: int) -> tuple:
    """The matrices and indices by which `sequences` resamples a table to the images' grids [B, 2].

    Images are transposed so that the shorter side comes first. That side is at most sqrt(N), which keeps
    the cells computed within a small factor of N whatever the image's shape.
    """
    gh, gw = table_grid
    short, long = math.isqrt(length), longest_side(length)
    patch = jnp.arange(length)

    def one(image_grid: jax.Array) -> tuple:
        h, w = image_grid
        tall = h > w
        rows, columns = bicubic_matrix(gh, h, long), bicubic_matrix(gw, w, long)
        first = jnp.concatenate(  # [S, gh + gw]: rows of the table, or of the turned table
            [jnp.where(tall, 0, rows[:short]), jnp.where(tall, columns[:short], 0)], axis=1
        )
        side = round_up(max(gh, gw), ALIGNED)
        second = jnp.where(  # [L, side]
            tall, jnp.pad(rows, ((0, 0), (0, side - gh))), jnp.pad(columns, ((0, 0), (0, side - gw)))
        )
        first = jnp.pad(first, ((0, 0), (0, round_up(gh + gw, ALIGNED) - gh - gw)))
        row, column = patch // w, patch % w
        cell = jnp.where(tall, column * long + row, row * long + column)
        across, along = jnp.arange(short)[:, None], jnp.arange(long)
        row, column = jnp.where(tall, along, across), jnp.where(tall, across, along)  # [S, L]
        patch_of = jnp.where((row < h) & (column < w), row * w + column, length)
        return first, second, jnp.where(patch < h * w, cell, short * long), patch_of.reshape(-1)

    return jax.vmap(one)(grid)


def sequences(
    special: jax.Array, table: jax.Array, layout: tuple, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """The positions of the images' sequences [B, P + N, D]; zero where a sequence is padding.

    Args:
        special: positions of the P tokens before the patches, [P, D].
        table: positions of the patches, [gh, gw, D].
        layout: the result of `layout`.
        dtype: of the products and the result.
    """
    first, second, cells, patches = layout
    special, table, first, second = (x.astype(dtype) for x in (special, table, first, second))
    gh, gw, _ = table.shape
    side, exact = second.shape[2], attention.precision(dtype)
    turned = table.swapaxes(0, 1)
    both = jnp.concatenate(  # [first.shape[2], side, D]
        [
            jnp.pad(table, ((0, 0), (0, side - gw), (0, 0))),
            jnp.pad(turned, ((0, first.shape[2] - gh - gw), (0, side - gh), (0, 0))),
        ]
    )
    part = jnp.einsum('bsi,ijd->bsjd', first, both, precision=exact)
    # one product per short row, though equal within an image: otherwise a GPU transposes `full` twice
    second = jnp.broadcast_to(second[:, None], (*part.shape[:2], *second.shape[1:]))  # [B, S, L, side]
    full = jnp.einsum('bslj,bsjd->bsld', second, part, precision=exact)
    return _joined(special, full.reshape(full.shape[0], -1, full.shape[-1]), cells, patches)


@jax.custom_vjp
def _joined(special: jax.Array, full: jax.Array, cells: jax.Array, patches: jax.Array) -> jax.Array:
    """special [P, D], then the rows `cells` [B, N] of full [B, S * L, D]: [B, P + N, D].

    patches: [B, S * L], the patch of each cell. With it the gradient is a gather, where XLA would scatter
    row by row. It gathers from the whole sequence: slicing first costs 4 % of a YOLOS-S step on a TPU.
    """
    del patches
    return jnp.concatenate([ops.repeat(special, full.shape[0]), _rows(full, cells)], axis=1)


def _joined_forward(special: jax.Array, full: jax.Array, cells: jax.Array, patches: jax.Array) -> tuple:
    return _joined(special, full, cells, patches), (special, patches)


def _joined_backward(saved: tuple, grad: jax.Array) -> tuple:
    special, patches = saved
    P = len(special)
    return ops.sum_over_batch(grad[:, :P]), _rows(grad, P + patches), None, None


_joined.defvjp(_joined_forward, _joined_backward)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """The rows `index` [B, M] of x [B, K, D]; zeros for indices out of bounds."""
    return jax.vmap(lambda x, index: x.at[index].get(mode='fill', fill_value=0))(x, index)
