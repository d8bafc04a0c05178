"""The model's small operations, written to be exact and fast: GELU, layer norm, bias, sums over a batch.

Letters: B batch, H heads, S tokens, P tokens that all images share, D width, d head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from yolos_jax import attention


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by erf as in torch; its derivative is recomputed from x.

    With erfc, as in `jax.nn.gelu`, a training step of YOLOS-Ti takes 1.07 times as long on a CPU.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    y = x.astype(jnp.float32)
    slope = _normal_cdf(y) + y * jnp.exp(-0.5 * y * y) * (2 * np.pi) ** -0.5
    return gelu(x), slope.astype(x.dtype) * dx


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer normalisation of x [..., D] with scale and bias [D], in float32.

    For float32 input the variance is taken around the mean, as in torch. For less exact types it is the
    mean square minus the squared mean, which reads x once and saves 8 % of a YOLOS-S step on a TPU
    (benchmarks/tpu_model.py).
    """
    if x.dtype == jnp.float32:
        return _exact_norm(x, scale, bias, eps)
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
    variance = jnp.maximum(variance, 0)  # the difference of nearly equal numbers may be negative
    return (x - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exact_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _exact_norm_forward(x, scale, bias, eps)[0]


def _exact_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> tuple:
    mean = x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + eps)
    return (x - mean) * (inverse * scale) + bias, (x, scale, mean, inverse)


def _exact_norm_backward(_: float, saved: tuple, grad: jax.Array) -> tuple:
    """The gradients of x, scale and bias.

    Sums over tokens and over the width are written as products: as reductions they take a CPU a tenth of a
    YOLOS-Ti step (docs/experiments.md).
    """
    x, scale, mean, inverse = saved
    normed, ones = (x - mean) * inverse, jnp.ones(x.shape[:-1], x.dtype)
    over_rows = lambda y: jnp.tensordot(ones, y, x.ndim - 1, precision='highest')  # [D]
    mean_of_row = lambda y: jnp.dot(y, scale, precision='highest')[..., None] / len(scale)
    of_normed = grad * scale - mean_of_row(grad) - normed * mean_of_row(grad * normed)
    return of_normed * inverse, over_rows(grad * normed), over_rows(grad)


_exact_norm.defvjp(_exact_norm_forward, _exact_norm_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [B, H, S, d] + bias [H, d], whose gradient is a product with ones.

    A plain sum over S costs a TPU as much as the three products before it (benchmarks/tpu_model.py).
    """
    return x + bias[:, None]


def _add_bias_backward(_: None, grad: jax.Array) -> tuple:
    ones = jnp.ones((8, grad.shape[2]), grad.dtype)  # the fewest rows that a TPU multiplies
    exact = attention.precision(grad.dtype)
    options = dict(precision=exact, preferred_element_type=jnp.float32)
    sums = jnp.einsum('ms,bhsd->bhmd', ones, grad, **options)  # every row the same
    return grad, sums[:, :, 0].sum(axis=0).astype(grad.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat(x: jax.Array, count: int) -> jax.Array:
    """x [P, D] for each of `count` images, [B, P, D]; its gradient is `sum_over_batch`."""
    return jnp.broadcast_to(x, (count, *x.shape))


repeat.defvjp(lambda x, count: (repeat(x, count), None), lambda _, __, grad: (sum_over_batch(grad),))


def sum_over_batch(x: jax.Array) -> jax.Array:
    """The sum [P, D] of x [B, P, D].

    The layout is fixed because XLA would make the batch the fastest axis of x for this sum on a GPU, if B
    is 32 or more, and with x that of all tokens [B, S, D] in the model, which the products then transpose.
    """
    return with_layout_constraint(x, Layout((0, 1, 2))).sum(axis=0)
