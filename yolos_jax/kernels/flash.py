"""softmax(q k^T / sqrt(d)) v on a CPU: a unit of work is a tile of a head's queries, with all of its keys.

The scores of a tile stay in the second level of the cache. `tiles` explains the letters.
"""

import math

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np

from yolos_jax.kernels import tiles, xla
from yolos_jax.kernels.tiles import GROUP, ONE, TILE
from yolos_jax.kernels.vectors import COLUMNS, exp_of, max_of

NAME = 'yolos_jax_attention'


@tiles.compiled
def _softmax(weights, width, columns, n, rows, norms, factors):
    """Change scores to exp(score - top) in place, 0 from key n on; the factors make weights of them."""
    for r in range(rows):
        weights[r * width + n : r * width + columns] = -np.inf
        top = max_of(weights, r * width, columns)
        total = exp_of(weights, r * width, columns, top)
        norms[r], factors[r] = top + math.log(total), ONE / total


@tiles.compiled
def _work(state, unit):
    """Units of (q, k, v, lengths) -> (out, norm): `unit`, and those that `take` gives."""
    frame, units = xla.words(state)[xla.FRAME], xla.words(state)[xla.UNITS]
    arguments, results = xla.arguments(frame), xla.results(frame)
    q, k, v = xla.floats(arguments[0]), xla.floats(arguments[1]), xla.floats(arguments[2])
    lengths = xla.ints(arguments[3])
    out, norm = xla.floats(results[0]), xla.floats(results[1])
    _, H, M, N, d, D = tiles.sizes(frame)
    step, per_head = H * d, tiles.count(M, TILE)
    width, scale = tiles.count(N, COLUMNS) * COLUMNS, np.float32(1 / math.sqrt(d))
    panels, values = np.empty(width * d, np.float32), np.empty(width * D, np.float32)
    queries, mixed = np.empty(TILE * D, np.float32), np.empty(TILE * D, np.float32)
    weights, factors = np.empty(TILE * width, np.float32), np.empty(TILE, np.float32)
    head, n, columns = -1, 0, 0
    while unit < units:
        if unit // per_head != head:
            head = unit // per_head
            n = max(min(np.int64(lengths[head // H]), N), 0)
            columns = tiles.count(n, COLUMNS) * COLUMNS
            keys = tiles.start(head, H, N, d)
            tiles.copy_to_panels(k, keys, step, n, d, panels)
            tiles.copy(v, keys, step, n, d, ONE, values, D, columns * D)
        first = unit % per_head * TILE
        rows, query = min(TILE, M - first), tiles.start(head, H, M, d) + first * step
        tiles.copy(q, query, step, rows, d, scale, queries, D, TILE * D)
        tiles.scores(queries, rows, D, panels, 0, columns, d, weights, width)
        _softmax(weights, width, columns, n, rows, norm[head * M + first :], factors)
        mixed[:] = 0
        for key in range(0, columns, GROUP):
            terms = min(GROUP, columns - key)
            tiles.add_product(weights, key, rows, width, terms, values, key * D, D, mixed)
        for r in range(rows):
            source, target = mixed[r * D :], out[query + r * step :]
            for c in range(d):
                target[c] = source[c] * factors[r]
        xla.finish(state)
        unit = xla.take(state)


@xla.entry
def _task(state):
    unit = xla.take(state)
    if unit < xla.words(state)[xla.UNITS]:
        _work(state, unit)
    xla.release(state)
    return 0


llvm.add_symbol(f'{NAME}_task', _task.address)
_address_of_task = xla.address_of(f'{NAME}_task')


@xla.entry
def _handler(frame):
    if not xla.answers_query(frame):
        B, H, M, _, _, _ = tiles.sizes(frame)
        xla.run(frame, B * H * tiles.count(M, TILE), _address_of_task(), 0)
    return 0


jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(_handler.ctypes), platform='cpu')


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, H, M, d] to k, v [B, H, N, d], of which `lengths` [B] are real; float32 and int32.

    Returns the output [B, H, M, d], and [B, H, M], the logarithm of the sum of exp(scores) of each query.

    Raises:
        ValueError: the arrays have other shapes.
    """
    B, H, _, d = q.shape
    if k.shape != (B, H, k.shape[2], d) or v.shape != k.shape or lengths.shape != (B,):
        raise ValueError(f'q {q.shape}, k {k.shape}, v {v.shape} and lengths {lengths.shape} do not fit')
    results = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    return tiles.call(NAME, results, q, k, v, lengths)
