"""A pre-norm transformer block and its layers.

Parameters carry the names of the reference checkpoint (hustvl/YOLOS, models/backbone.py), with Flax's
kernel and scale for torch's weight.

Letters: B batch, S tokens of a sequence, M those that come out, D width, H heads, d = D / H.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax import attention, ops, rope, spmd

# float32 with jax_enable_x64 too
_xavier = nn.initializers.xavier_uniform(dtype=jnp.float32)  # pre-trained weights replace it
_zeros, _ones = (nn.initializers.constant(value, jnp.float32) for value in (0, 1))


def torch_uniform(fan_in: int) -> Callable:
    """torch's default initialiser for kernels and biases of dense layers and convolutions."""
    bound = fan_in**-0.5
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


class Dense(nn.Module):
    """A dense layer."""

    features: int
    dtype: Any
    kernel_init: Callable = _xavier
    bias_init: Callable = _zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = spmd.gathered(self.param('kernel', self.kernel_init, (x.shape[-1], self.features)))
        bias = spmd.gathered(self.param('bias', self.bias_init, (self.features,)))
        x, kernel, bias = (y.astype(self.dtype) for y in (x, kernel, bias))
        return jnp.matmul(x, kernel, precision=attention.precision(self.dtype)) + bias


class LayerNorm(nn.Module):
    """Layer normalisation in float32 (`ops.layer_norm`)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = spmd.gathered(self.param('scale', _ones, x.shape[-1:]))
        bias = spmd.gathered(self.param('bias', _zeros, x.shape[-1:]))
        return ops.layer_norm(x, scale, bias, self.eps)


class QueryKeyValue(nn.Module):
    """The dense layer before attention: q [B, H, M, d] of the tokens in `rows`, k, v [B, H, S, d] of all.

    The products already have the layout in which the kernel reads them: on a TPU, heads first, which saves
    a tenth of a YOLOS-S step.
    """

    heads: int
    dtype: Any
    heads_first: bool  # `attention.heads_first`

    @nn.compact
    def __call__(self, x: jax.Array, rows: slice) -> list[jax.Array]:
        D = x.shape[-1]
        kernel = spmd.gathered(self.param('kernel', _xavier, (D, 3 * D)))
        bias = spmd.gathered(self.param('bias', _zeros, (3 * D,)))
        kernels = kernel.reshape(D, 3, self.heads, -1).astype(self.dtype)
        biases = bias.reshape(3, self.heads, -1).astype(self.dtype)

        def project(x: jax.Array, i: int) -> jax.Array:
            exact = attention.precision(self.dtype)
            if self.heads_first:
                y = jnp.einsum('bsc,chd->bhsd', x, kernels[:, i], precision=exact)
                return ops.add_bias(y, biases[i])
            y = jnp.einsum('bsc,chd->bshd', x, kernels[:, i], precision=exact) + biases[i]
            return y.swapaxes(1, 2)

        return [project(x[:, rows], 0), project(x, 1), project(x, 2)]


class JoinHeads(nn.Module):
    """The dense layer after attention: [B, H, M, d] to [B, M, D]."""

    dtype: Any
    heads_first: bool  # `attention.heads_first`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, H, _, d = x.shape
        kernel = spmd.gathered(self.param('kernel', _xavier, (H * d, H * d)))
        kernel = kernel.reshape(H, d, H * d).astype(self.dtype)
        bias = spmd.gathered(self.param('bias', _zeros, (H * d,))).astype(self.dtype)
        exact = attention.precision(self.dtype)
        # the order in which a device transposes less
        summed = ((3, 1), (1, 0)) if self.heads_first else ((1, 3), (0, 1))
        return jax.lax.dot_general(x, kernel, (summed, ((), ())), precision=exact) + bias


class Attention(nn.Module):
    """Self-attention of the tokens in `rows` to all tokens of the sequence."""

    heads: int
    dtype: Any
    kernel: Callable  # one of `attention`'s

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array, rows: slice, angles: tuple | None) -> jax.Array:
        heads_first = attention.heads_first(self.kernel)
        q, k, v = QueryKeyValue(self.heads, self.dtype, heads_first, name='qkv')(x, rows)
        if angles:
            q, k = rope.rotate(q, *(y[:, rows] for y in angles)), rope.rotate(k, *angles)
        return JoinHeads(self.dtype, heads_first, name='proj')(self.kernel(q, k, v, lengths))


class Mlp(nn.Module):
    """Two dense layers around the exact (erf) GELU; the tanh form moves logits by 5e-4."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(4 * x.shape[-1], self.dtype, name='fc1')(x)
        return Dense(x.shape[-1], self.dtype, name='fc2')(ops.gelu(y))


class Block(nn.Module):
    """A pre-norm transformer block; only the tokens in `rows` come out.

    angles: `rope.angles`. branch_scale: float32 [2, B], factors on the outputs of attention and MLP before
    the residual additions (stochastic depth).
    """

    heads: int
    eps: float
    dtype: Any
    attention_kernel: Callable = attention.dense

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        rows: slice = slice(None),
        angles: tuple | None = None,
        branch_scale: jax.Array | None = None,
    ) -> jax.Array:
        scale = None if branch_scale is None else branch_scale[:, :, None, None]
        scaled = lambda y, i: y if scale is None else y * scale[i].astype(y.dtype)
        y = LayerNorm(self.eps, name='norm1')(x).astype(self.dtype)
        attend = Attention(self.heads, self.dtype, self.attention_kernel, name='attn')
        x = x[:, rows] + scaled(attend(y, lengths, rows, angles), 0)
        y = LayerNorm(self.eps, name='norm2')(x).astype(self.dtype)
        return x + scaled(Mlp(self.dtype, name='mlp')(y), 1)
