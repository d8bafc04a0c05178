"""The vector code of the CPU's kernels equals plain loops."""

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from yolos_jax.kernels.tiles import FASTMATH
from yolos_jax.kernels.vectors import COLUMNS, LANES, ROWS, add_product, exp_of, max_of, product, transpose

rng = np.random.default_rng(0)


def numbers(*shape):
    return rng.normal(size=shape).astype(np.float32)


@njit
def multiply(x, row, step, y, stride, terms, out, width, adds):
    if adds:
        add_product(x, 3, row, step, y, 5, stride, terms, out, 7, width)
    else:
        product(x, 3, row, step, y, 5, stride, terms, out, 7, width)


@pytest.mark.parametrize('terms', [1, 2, 77])
@pytest.mark.parametrize('adds', [False, True])
@pytest.mark.parametrize('transposed', [False, True])
def test_a_product_is_that_of_plain_loops_and_leaves_the_rest_alone(terms, adds, transposed):
    row, step = (1, ROWS + 2) if transposed else (terms + 1, 1)
    stride, width = COLUMNS + 3, COLUMNS + 9
    x, y = numbers(3 + ROWS * (terms + 3) * 2), numbers(5 + terms * stride)
    before = numbers(7 + ROWS * width + 20)
    out, expected = before.copy(), before.astype(np.float64)
    multiply(x, row, step, y, stride, terms, out, width, adds)
    for r in range(ROWS):
        for c in range(COLUMNS):
            total = sum(
                float(x[3 + r * row + n * step]) * float(y[5 + n * stride + c]) for n in range(terms)
            )
            expected[7 + r * width + c] = total + (before[7 + r * width + c] if adds else 0)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    untouched = expected == before
    assert untouched.sum() == len(before) - ROWS * COLUMNS
    np.testing.assert_array_equal(out[untouched], before[untouched])


def test_a_product_keeps_its_sums_in_registers_on_every_cpu():
    @njit
    def multiply(x, y, terms, out):
        product(x, 0, terms, 1, y, 0, COLUMNS, terms, out, 0, COLUMNS)

    multiply(numbers(ROWS * 3), numbers(3 * COLUMNS), 3, numbers(ROWS * COLUMNS))
    (compiled,) = multiply.inspect_llvm().values()
    assert compiled.count('call <') == ROWS * COLUMNS // LANES  # a loop that is unrolled has more of them


@njit
def turn(x, step, out, stride):
    transpose(x, 3, step, out, 7, stride)


def test_a_square_of_numbers_is_transposed_and_the_rest_left_alone():
    step, stride = LANES + 2, LANES + 5
    x, out = numbers(3 + LANES * step), numbers(7 + LANES * stride)
    expected = out.copy()
    for r in range(LANES):
        for c in range(LANES):
            expected[7 + c * stride + r] = x[3 + r * step + c]
    turn(x, step, out, stride)
    np.testing.assert_array_equal(out, expected)


@njit(fastmath=FASTMATH)
def exponentials(x, size, top):
    return exp_of(x, 2, size, top)


@njit
def largest(x, size):
    return max_of(x, 2, size)


def test_exponentials_are_exact_to_two_units_in_the_last_place():
    x = np.sort(-(rng.uniform(0, 9.3, 1000 * COLUMNS) ** 2)).astype(np.float32)  # to -86.5
    out = np.concatenate([numbers(2), x + np.float32(0.0), numbers(3)])
    around = out[[0, 1, -3, -2, -1]]
    total = exponentials(out, len(x), np.float32(0))
    exact = np.exp(x.astype(np.float64))
    assert np.abs((out[2:-3] - exact) / np.spacing(exact.astype(np.float32))).max() <= 2
    np.testing.assert_allclose(total, exact.sum(), rtol=1e-5)
    np.testing.assert_array_equal(out[[0, 1, -3, -2, -1]], around)


def test_exponentials_of_masked_scores_are_zero_and_nan_stays():
    x = np.zeros(2 + COLUMNS, np.float32)
    x[2:7] = -np.inf, -88, -1e30, np.nan, -87
    total = exponentials(x, COLUMNS, np.float32(0))
    assert np.isnan(total) and np.isnan(x[5])
    np.testing.assert_array_equal(x[[2, 3, 4]], 0)
    np.testing.assert_allclose(x[6], np.exp(-87.0), rtol=3e-7)
    np.testing.assert_array_equal(x[7:], 1)


def test_the_largest_of_a_row_is_found_in_every_lane():
    x = -abs(numbers(2 + 3 * COLUMNS + 2))
    x[[0, 1, -1, -2]] = 9
    for i in range(2, 2 + 3 * COLUMNS):
        y = x.copy()
        y[i] = 5
        assert largest(y, 3 * COLUMNS) == 5


def test_the_largest_of_a_row_may_be_any_number():
    for value in np.float32([-3.3e38, -np.inf, np.inf]):
        assert largest(np.full(2 + COLUMNS, value, np.float32), COLUMNS) == value


def test_the_same_holds_on_a_cpu_without_fma():
    """There a product and a sum are two operations, which LLVM may combine with others."""
    generic = {'NUMBA_CPU_NAME': 'generic', 'NUMBA_CPU_FEATURES': ''}
    others = '-q', '-p', 'no:cacheprovider', '-k', 'not without_fma'
    command = [sys.executable, '-m', 'pytest', __file__, *others]
    done = subprocess.run(command, env=os.environ | generic, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
