"""The model's elementwise operations in the forms that are exact and fast: GELU, layer norm, a bias.

Letters: B batch, H heads, S tokens, D width, d head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    is_exact, x = x.dtype == jnp.float32, x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    if is_exact:
        variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    else:
        variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)  # the difference of nearly equal numbers may be negative
    return (x - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias


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
