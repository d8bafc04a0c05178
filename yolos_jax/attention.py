"""Self-attention over sequences whose padding sits at the end: one function per kernel.

Every kernel computes softmax(q k^T / sqrt(d)) v, with the keys from `lengths` on masked out.
q is [B, M, H, d], k and v are [B, N, H, d], lengths is int32 [B] with 1 <= lengths <= N.

Letters: B batch, M queries, N keys, H heads, d head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from yolos_jax import spmd

KEPT = 'attention'  # the name under which `splash` gives its output, for `jax.checkpoint_policies`
BLOCKS = (
    512,
    640,
    768,
    896,
    1024,
)  # of `splash`; of 128, its default, a matrix unit is idle most of the time


def for_platform(platform: str, dtype: jnp.dtype) -> Callable:
    """The kernel for a platform ('cpu', 'gpu' or 'tpu') and the type of the activations.

    float32 is for exact work: it never goes to a fused kernel, whose products are rounded to bfloat16
    or TF32.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform == 'cpu':
        return by_head
    if platform == 'gpu' and half:
        return fused
    return splash if platform == 'tpu' and half else dense


def kept_by(kernel: Callable) -> str | None:
    """The name of what alone a block should keep for its backward pass with this kernel; None for all.

    On a TPU the rest is computed again in less time than it takes to write and to read it: of YOLOS-S, 42
    ms outside the kernel for 47, and 0.6 GB for 3.0, by XLA's own estimate (benchmarks/tpu_model.py).
    """
    return KEPT if getattr(kernel, 'func', kernel) is splash else None


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of products of a type: GPUs and TPUs round float32 unless they are told not to."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def dense(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Plain products: every score in memory at once, softmax in float32."""
    of_keys = weights(q, k, lengths).astype(v.dtype)
    return jnp.einsum('bhmn,bnhd->bmhd', of_keys, v, precision=precision(q.dtype))


def weights(q: jax.Array, k: jax.Array, lengths: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)), [B, H, M, N] in float32."""
    exact = precision(q.dtype)
    scores = jnp.einsum('bmhd,bnhd->bhmn', q, k, preferred_element_type=jnp.float32, precision=exact)
    scores = jnp.where(_is_real(k, lengths)[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def fused(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, implementation: str = 'cudnn'
) -> jax.Array:
    """cuDNN's flash attention; head widths are padded to the multiple of 8 it asks for."""
    width = q.shape[-1]
    pad = [(0, 0)] * 3 + [(0, -width % 8)]
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, pad) for x in (q, k, v)),
        scale=width**-0.5,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[..., :width]


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, interpret: bool = False
) -> jax.Array:
    """The TPU's block kernel; few queries (the last block's [DET] tokens) do not fill its blocks."""
    if q.shape[1] != k.shape[1]:
        return dense(q, k, v, lengths)
    return spmd.over_batch(functools.partial(_splash, interpret=interpret))(q, k, v, lengths)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, M, H, d = q.shape
    block = splash_block(M)
    pad = [(0, 0), (0, -M % block), (0, 0), (0, 0)]

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x, pad).transpose(0, 2, 1, 3)  # [B, H, M padded, d]

    q, k, v = heads_first(q * d**-0.5), heads_first(k), heads_first(v)
    size = q.shape[2]
    mask = masks.MultiHeadMask([masks.FullMask((size, size))] * H)
    names = 'block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq'.split()
    sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
    options = dict(block_sizes=sizes, residual_checkpoint_name=KEPT, interpret=interpret)
    attend = kernel.make_splash_mha_single_device(mask, **options)
    padding = (jnp.arange(size) >= lengths[:, None]).astype(jnp.int32)
    segments = kernel.SegmentIds(q=jnp.zeros_like(padding), kv=padding)
    return jax.vmap(attend)(q, k, v, segments).transpose(0, 2, 1, 3)[:, :M]


def splash_block(size: int) -> int:
    """The side of the blocks of a sequence: one block up to 1,024, else what pads it least, the largest."""
    if size <= BLOCKS[-1]:
        return size + -size % 128  # the kernel asks for multiples of 128
    return min(BLOCKS, key=lambda block: (-size % block, -block))


def _is_real(k: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.arange(k.shape[1]) < lengths[:, None]  # [B, N]


@jax.custom_vjp
def by_head(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """One head at a time, scores computed again in the backward pass.

    XLA on a CPU keeps a head's scores in cache and never stores all of them: a training step of
    YOLOS-Ti takes 0.6 of the time and 0.4 of the memory of `dense`.
    """
    return _forward(q, k, v, lengths)[0]


def _heads_first(x: jax.Array) -> jax.Array:
    return x.transpose(2, 0, 1, 3)  # [H, B, N, d]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.einsum(
        'bmd,bnd->bmn', q, k, preferred_element_type=jnp.float32, precision=precision(q.dtype)
    )
    return scores + mask


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple:
    mask = jnp.where(_is_real(k, lengths), 0.0, -jnp.inf)[:, None]  # [B, 1, N]
    exact = precision(q.dtype)

    def head(args: tuple) -> tuple:
        q, k, v = args
        scores = _scores(q, k, mask)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum('bmn,bnd->bmd', weights.astype(v.dtype), v, precision=exact)
        return out / total.astype(v.dtype), top + jnp.log(total)

    scaled = _heads_first(q) * q.shape[-1] ** -0.5
    out, norm = jax.lax.map(head, (scaled, _heads_first(k), _heads_first(v)))
    return out.transpose(1, 2, 0, 3), (q, k, v, mask, out, norm)


def _backward(saved: tuple, grad: jax.Array) -> tuple:
    q, k, v, mask, out, norm = saved
    scale, exact = q.shape[-1] ** -0.5, precision(q.dtype)

    def head(args: tuple) -> tuple:
        q, k, v, out, norm, grad = args
        q = q * scale
        weights = jnp.exp(_scores(q, k, mask) - norm)
        d_weights = jnp.einsum('bmd,bnd->bmn', grad, v, preferred_element_type=jnp.float32, precision=exact)
        inner = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = jnp.einsum('bmn,bnd->bmd', d_scores, k, precision=exact) * scale
        dk = jnp.einsum('bmn,bmd->bnd', d_scores, q, precision=exact)
        dv = jnp.einsum('bmn,bmd->bnd', weights.astype(v.dtype), grad, precision=exact)
        return dq, dk, dv

    heads = (*map(_heads_first, (q, k, v)), out, norm, _heads_first(grad))
    dq, dk, dv = jax.lax.map(head, heads)
    return *(x.transpose(1, 2, 0, 3) for x in (dq, dk, dv)), None


by_head.defvjp(_forward, _backward)
