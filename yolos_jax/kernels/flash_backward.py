"""The gradient of `flash`: a unit of work is a part of a head's keys, with all of its queries.

The scores of a tile of queries and a group of keys stay in the first level of the cache. A unit's gradients
of k and v are whole; those of q are summed over the parts. The order of each sum is the same whatever
the number of threads. `tiles` explains the letters.
"""

import math

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np

from yolos_jax.kernels import tiles, xla
from yolos_jax.kernels.tiles import GROUP, ONE, STRIDE, TILE, ZERO
from yolos_jax.kernels.vectors import COLUMNS, ROWS, exp_of

NAME = 'yolos_jax_attention_backward'
UNITS = 12  # at least, if there are as many groups of keys, for threads to share


@tiles.compiled
def _inner_products(grads, D, out, query, step, rows, d, inners):
    """Of each query's output and its gradient."""
    for r in range(rows):
        total, of_grad, of_out = ZERO, grads[r * D :], out[query + r * step :]
        for c in range(d):
            total += of_grad[c] * of_out[c]
        inners[r] = total


@tiles.compiled
def _softmax_gradient(weights, d_scores, terms, n, rows, norms, inners):
    """Change scores to weights, and their gradients to those of scores; 0 from key n on."""
    for r in range(rows):
        row = r * STRIDE
        weights[row + max(min(n, terms), 0) : row + terms] = -np.inf
        exp_of(weights, row, terms, norms[r])
        of_weights, of_scores = weights[row:], d_scores[row:]
        for c in range(terms):
            of_scores[c] = of_weights[c] * (of_scores[c] - inners[r])


@tiles.compiled
def _work(state, unit):
    """Units of (q, k, v, lengths, out, norm, gradient of out) -> gradients of q, k and v.

    `unit`, and those that `take` gives. The scratch holds the parts of q's gradient.
    """
    frame, units = xla.words(state)[xla.FRAME], xla.words(state)[xla.UNITS]
    arguments, results = xla.arguments(frame), xla.results(frame)
    q, k, v = xla.floats(arguments[0]), xla.floats(arguments[1]), xla.floats(arguments[2])
    lengths, out, norm = xla.ints(arguments[3]), xla.floats(arguments[4]), xla.floats(arguments[5])
    grad, dk, dv = xla.floats(arguments[6]), xla.floats(results[1]), xla.floats(results[2])
    B, H, M, N, d, D = tiles.sizes(frame)
    step, scale = H * d, np.float32(1 / math.sqrt(d))
    parts, groups = units // (B * H), tiles.count(N, GROUP)
    dq = xla.scratch(state, parts * len(q))
    most = tiles.count(groups, parts) * GROUP  # keys of a part
    key_panels, value_panels = np.empty(most * d, np.float32), np.empty(most * d, np.float32)
    keys = np.empty(most * D, np.float32)
    dk_sums, dv_sums = np.empty((most + ROWS) * D, np.float32), np.empty((most + ROWS) * D, np.float32)
    queries, grads = np.empty(TILE * D, np.float32), np.empty(TILE * D, np.float32)
    mixed, inners = np.empty(TILE * D, np.float32), np.empty(TILE, np.float32)
    weights, d_scores = np.zeros(TILE * STRIDE, np.float32), np.zeros(TILE * STRIDE, np.float32)
    while unit < units:
        head, part = unit // parts, unit % parts
        low, high = groups * part // parts * GROUP, min(groups * (part + 1) // parts * GROUP, N)
        n = max(min(np.int64(lengths[head // H]), high) - low, 0)
        columns = tiles.count(n, COLUMNS) * COLUMNS
        key = tiles.start(head, H, N, d) + low * step
        tiles.copy_to_panels(k, key, step, n, d, key_panels)
        tiles.copy_to_panels(v, key, step, n, d, value_panels)
        tiles.copy(k, key, step, n, d, scale, keys, D, columns * D)
        dk_sums[: columns * D] = 0
        dv_sums[: columns * D] = 0
        for first in range(0, M, TILE):
            rows, query = min(TILE, M - first), tiles.start(head, H, M, d) + first * step
            tiles.copy(q, query, step, rows, d, scale, queries, D, TILE * D)
            tiles.copy(grad, query, step, rows, d, ONE, grads, D, TILE * D)
            _inner_products(grads, D, out, query, step, rows, d, inners)
            mixed[:] = 0
            for start in range(0, columns, GROUP):
                terms = min(GROUP, columns - start)
                tiles.scores(queries, rows, D, key_panels, start, terms, d, weights, STRIDE)
                tiles.scores(grads, rows, D, value_panels, start, terms, d, d_scores, STRIDE)
                norms = norm[head * M + first :]
                _softmax_gradient(weights, d_scores, terms, n - start, rows, norms, inners)
                tiles.add_product(d_scores, 0, rows, STRIDE, terms, keys, start * D, D, mixed)
                tiles.add_transposed(d_scores, rows, terms, queries, D, dk_sums, start * D)
                tiles.add_transposed(weights, rows, terms, grads, D, dv_sums, start * D)
            tiles.copy_back(mixed, D, rows, rows, d, dq, part * len(q) + query, step)
        tiles.copy_back(dk_sums, D, n, high - low, d, dk, key, step)
        tiles.copy_back(dv_sums, D, n, high - low, d, dv, key, step)
        xla.finish(state)
        unit = xla.take(state)


@tiles.compiled
def _add_up(of_parts, parts, out):
    for i in range(len(out)):
        out[i] = of_parts[i]
    for part in range(1, parts):
        of_part = of_parts[part * len(out) :]
        for i in range(len(out)):
            out[i] += of_part[i]


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
        B, H, _, N, _, _ = tiles.sizes(frame)
        parts = min(tiles.count(UNITS, B * H), tiles.count(N, GROUP))
        dq = xla.floats(xla.results(frame)[0])
        of_parts = np.empty(parts * len(dq), np.float32) if parts > 1 else dq
        xla.run(frame, B * H * parts, _address_of_task(), of_parts.ctypes.data)
        if parts > 1:
            _add_up(of_parts, parts, dq)
    return 0


jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(_handler.ctypes), platform='cpu')


def gradients(*args: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, from the arguments and results of `attend` and its output's gradient."""
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in args[:3]]
    return tiles.call(NAME, results, *args)
