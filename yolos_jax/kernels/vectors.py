"""Products of small matrices and exponentials for Numba, written in LLVM IR with explicit vectors.

A product keeps its result, ROWS x COLUMNS, in registers: plain Numba would load and store it for each term.
A forward pass of YOLOS-Ti takes 0.73 of the time that it took with XLA's programs for attention
(docs/experiments.md); tests/test_kernels.py has the plain loops.
"""

import math
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

# what Numba compiles for, which its cache knows: of this CPU, unless NUMBA_CPU_FEATURES says otherwise
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
# AVX-512 has 32 registers of 16 numbers, AVX 16 of 8, NEON 32 of 4
LANES, ROWS = (16, 12) if '+avx512f' in _FEATURES.split(',') else (8, 6)
COLUMNS = 2 * LANES
HALVES = 0, LANES  # where the vectors of a row of a product begin

FLOAT, INT, WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)


def _all(value: float, kind: ir.Type = VECTOR) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _choose(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
    """The lanes of x, and those of y counted on."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))


def _broadcast(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), x, INT(0))
    return _choose(builder, first, first, [0] * LANES)


def _load(builder: ir.IRBuilder, place: ir.Value) -> ir.Value:
    return builder.load(builder.bitcast(place, VECTOR.as_pointer()), align=4)


def _store(builder: ir.IRBuilder, x: ir.Value, place: ir.Value) -> None:
    builder.store(x, builder.bitcast(place, VECTOR.as_pointer()), align=4)


def _fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f'llvm.fmuladd.v{LANES}f32')
    return builder.call(function, [x, y, z])


def _not_unrolled(module: ir.Module) -> ir.MDValue:
    """The mark of a loop that LLVM is not to unroll.

    For AMD's Zen 4 it would, run out of registers, and attention would take 1.3 times as long.
    """
    option = module.add_metadata(['llvm.loop.unroll.disable'])
    loop = ir.values.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = loop, option  # LLVM wants the node to begin with itself
    return loop


def _place(context, builder, signature, values, i: int) -> ir.Value:
    """Where the number of array `values[i]` is that `values[i + 1]` counts to."""
    array = context.make_array(signature.args[i])(context, builder, values[i])
    return builder.gep(array.data, [values[i + 1]])


def _make_product(adds: bool) -> Callable:
    @intrinsic
    def product(typing, x, i, row, step, y, j, stride, terms, out, k, width):  # noqa: ARG001  Numba's interface
        """out[k + r width + c] = the sum over n < terms of x[i + r row + n step] y[j + n stride + c].

        For r < ROWS and c < COLUMNS, with terms >= 1; float32 arrays of one dimension. `add_product` adds
        this to `out`.
        """

        def build(context, builder, signature, values):
            x, y, out = (_place(context, builder, signature, values, n) for n in (0, 4, 8))
            row, step, stride, terms, width = (values[n] for n in (2, 3, 6, 7, 10))
            lefts = [builder.gep(x, [builder.mul(row, WORD(r))]) for r in range(ROWS)]
            starts = [builder.gep(out, [builder.mul(width, WORD(r))]) for r in range(ROWS)]
            places = [builder.gep(start, [WORD(half)]) for start in starts for half in HALVES]
            sums = [_load(builder, place) if adds else _all(0.0) for place in places]
            before, loop = builder.block, builder.append_basic_block('terms')
            builder.branch(loop)
            builder.position_at_end(loop)
            n, totals = builder.phi(WORD), [builder.phi(VECTOR) for _ in sums]
            right = builder.gep(y, [builder.mul(n, stride)])
            rights = [_load(builder, builder.gep(right, [WORD(half)])) for half in HALVES]
            at = builder.mul(n, step)
            factors = [_broadcast(builder, builder.load(builder.gep(left, [at]))) for left in lefts]
            pairs = [(factor, vector) for factor in factors for vector in rights]
            new = [_fma(builder, *pair, total) for pair, total in zip(pairs, totals, strict=True)]
            following = builder.add(n, WORD(1))
            for phi, first, later in zip([n, *totals], [WORD(0), *sums], [following, *new], strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(later, loop)
            after = builder.append_basic_block('sums')
            branch = builder.cbranch(builder.icmp_signed('<', following, terms), loop, after)
            branch.set_metadata('llvm.loop', _not_unrolled(builder.module))
            builder.position_at_end(after)
            for total, place in zip(new, places, strict=True):
                _store(builder, total, place)
            return context.get_dummy_value()

        return types.void(x, i, row, step, y, j, stride, terms, out, k, width), build

    return product


product, add_product = _make_product(adds=False), _make_product(adds=True)


@intrinsic
def transpose(typing, x, i, step, out, k, stride):  # noqa: ARG001
    """out[k + c stride + r] = x[i + r step + c] for r, c < LANES.

    With plain loops the forward pass of attention takes 1.06 (YOLOS) to 1.2 times (224x224 pixels) as long.
    """

    def build(context, builder, signature, values):
        x, out = (_place(context, builder, signature, values, n) for n in (0, 3))
        row_of = lambda place, width, r: builder.gep(place, [builder.mul(width, WORD(r))])
        rows = [_load(builder, row_of(x, values[2], r)) for r in range(LANES)]
        bit = LANES // 2
        while bit:  # exchange this bit of the row's number with that of the column's
            low = [c if not c & bit else LANES + c - bit for c in range(LANES)]
            high = [c + bit if not c & bit else LANES + c for c in range(LANES)]
            for r in (r for r in range(LANES) if not r & bit):
                pair = rows[r], rows[r + bit]
                rows[r], rows[r + bit] = (_choose(builder, *pair, lanes) for lanes in (low, high))
            bit //= 2
        for c, column in enumerate(rows):
            _store(builder, column, row_of(out, values[5], c))
        return context.get_dummy_value()

    return types.void(x, i, step, out, k, stride), build


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp(x) of x <= 0 as 2^n exp(rest), |rest| <= log(2) / 2, with the polynomial of Cephes' expf."""
    fma = lambda *args: _fma(builder, *args)
    rounding = _all(1.5 * 2**23)  # added, it leaves an integer in the lowest bits
    shifted = fma(x, _all(1.4426950408889634), rounding)
    # with a flag, or Numba adds 'reassoc', by which LLVM drops the rounding on a CPU without FMA
    n, whole = builder.bitcast(shifted, INTS), builder.fsub(shifted, rounding, flags=['nsz'])
    rest = fma(whole, _all(2.12194440e-4), fma(whole, _all(-0.693359375), x))
    value = _all(1.9875691500e-4)
    for term in 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.50000001201, 1.0, 1.0:
        value = fma(value, rest, _all(term))
    power = builder.bitcast(builder.shl(builder.add(n, _all(127, INTS)), _all(23, INTS)), VECTOR)
    is_small = builder.fcmp_ordered('<', x, _all(-87.0))  # exp(-87) is 1.6e-38
    return builder.select(is_small, _all(0.0), builder.fmul(value, power))


def _fold(builder, row: ir.Value, size: ir.Value, *, start: float, combine: Callable, change: Callable):
    """Change each of `size` numbers, a multiple of COLUMNS, and combine them all."""
    folds = [cgutils.alloca_once_value(builder, _all(start)) for _ in HALVES]
    with cgutils.for_range_slice(builder, WORD(0), size, WORD(COLUMNS)) as (i, _):
        for half, fold in zip(HALVES, folds, strict=True):
            place = builder.gep(row, [builder.add(i, WORD(half))])
            builder.store(combine(builder.load(fold), change(place)), fold)
    result, lanes = combine(*(builder.load(fold) for fold in folds)), LANES
    while lanes > 1:
        lanes //= 2
        halves = (_choose(builder, result, result, list(range(at, at + lanes))) for at in (0, lanes))
        result = combine(*halves)
    return builder.extract_element(result, INT(0))


@intrinsic
def max_of(typing, x, i, size):  # noqa: ARG001
    """The largest of x[i : i + size], size a multiple of COLUMNS."""

    def build(context, builder, signature, values):
        return _fold(
            builder,
            _place(context, builder, signature, values, 0),
            values[2],
            start=-math.inf,
            combine=lambda a, b: builder.select(builder.fcmp_ordered('>', a, b), a, b),
            change=lambda place: _load(builder, place),
        )

    return types.float32(x, i, size), build


@intrinsic
def exp_of(typing, x, i, size, top):  # noqa: ARG001
    """Change x[i : i + size] to exp(x - top) in place, and return the sum; no x may exceed top.

    size is a multiple of COLUMNS. Relative error: at most 2 ulp; 0 from x - top = -87 on.
    """

    def build(context, builder, signature, values):
        top = _broadcast(builder, values[3])

        def change(place: ir.Value) -> ir.Value:
            result = _exp(builder, builder.fsub(_load(builder, place), top))
            _store(builder, result, place)
            return result

        row = _place(context, builder, signature, values, 0)
        return _fold(builder, row, values[2], start=0.0, combine=builder.fadd, change=change)

    return types.float32(x, i, size, top), build
