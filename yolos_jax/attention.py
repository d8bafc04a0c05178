"""Self-attention over sequences whose padding sits at the end, one kernel per platform.

Every function here computes softmax(q k^T / sqrt(d)) v with the keys from `lengths` on masked out.
q is [B, M, H, d], k and v are [B, N, H, d], lengths is int32 [B] with 1 <= lengths <= N.

Letters: B batch, M queries, N keys, H heads, d head width.
"""

import jax
import jax.numpy as jnp

from yolos_jax import sharding


def attention(q, k, v, lengths):
    """Attention [B, M, H, d] by the kernel that suits the platform and the type.

    float32 is for exact work: it never goes to a fused kernel, whose products are rounded to bfloat16
    or TF32. The last block's few [DET] queries are too few rows for the TPU kernel's blocks.
    """
    platform = jax.default_backend()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if platform == 'cpu':
        return by_head(q, k, v, lengths)
    if platform == 'tpu' and half and q.shape[1] == k.shape[1]:
        return sharding.over_batch(splash)(q, k, v, lengths)
    if platform == 'gpu' and half:
        return fused(q, k, v, lengths)
    return dense(q, k, v, lengths)


def dense(q, k, v, lengths):
    """Plain products: every score in memory at once, softmax in float32."""
    scores = jnp.einsum('bmhd,bnhd->bhmn', q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(_real(k, lengths)[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum('bhmn,bnhd->bmhd', weights, v)


def fused(q, k, v, lengths, implementation='cudnn'):
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


def splash(q, k, v, lengths, interpret=False):
    """The TPU's block kernel; sequences are padded to the multiple of 128 it asks for."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, M, H, d = q.shape
    pad = [(0, 0), (0, -M % 128), (0, 0), (0, 0)]
    heads_first = lambda x: jnp.pad(x, pad).transpose(0, 2, 1, 3)  # [B, H, M padded, d]
    q, k, v = heads_first(q * d**-0.5), heads_first(k), heads_first(v)
    size = q.shape[2]
    mask = masks.MultiHeadMask([masks.FullMask((size, size))] * H)
    attend = kernel.make_splash_mha_single_device(mask, interpret=interpret)
    padding = (jnp.arange(size) >= lengths[:, None]).astype(jnp.int32)
    segments = kernel.SegmentIds(q=jnp.zeros_like(padding), kv=padding)
    return jax.vmap(attend)(q, k, v, segments).transpose(0, 2, 1, 3)[:, :M]


def _real(k, lengths):
    return jnp.arange(k.shape[1]) < lengths[:, None]  # [B, N]


@jax.custom_vjp
def by_head(q, k, v, lengths):
    """One head at a time, scores computed again in the backward pass.

    XLA on a CPU keeps a head's scores in cache and never stores all of them: a training step of
    YOLOS-Ti takes 0.6 of the time and 0.4 of the memory of `dense`.
    """
    return _forward(q, k, v, lengths)[0]


def _heads_first(x):
    return x.transpose(2, 0, 1, 3)  # [H, B, N, d]


def _scores(q, k, mask):
    scores = jnp.einsum('bmd,bnd->bmn', q, k, preferred_element_type=jnp.float32)
    return scores + mask


def _forward(q, k, v, lengths):
    mask = jnp.where(_real(k, lengths), 0.0, -jnp.inf)[:, None]  # [B, 1, N]

    def head(args):
        q, k, v = args
        scores = _scores(q, k, mask)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum('bmn,bnd->bmd', weights.astype(v.dtype), v) / total.astype(v.dtype)
        return out, top + jnp.log(total)

    scaled = _heads_first(q) * q.shape[-1] ** -0.5
    out, norm = jax.lax.map(head, (scaled, _heads_first(k), _heads_first(v)))
    return out.transpose(1, 2, 0, 3), (q, k, v, mask, out, norm)


def _backward(saved, grad):
    q, k, v, mask, out, norm = saved
    scale = q.shape[-1] ** -0.5

    def head(args):
        q, k, v, out, norm, grad = args
        q = q * scale
        weights = jnp.exp(_scores(q, k, mask) - norm)
        d_weights = jnp.einsum('bmd,bnd->bmn', grad, v, preferred_element_type=jnp.float32)
        inner = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = jnp.einsum('bmn,bnd->bmd', d_scores, k) * scale
        dk = jnp.einsum('bmn,bmd->bnd', d_scores, q)
        dv = jnp.einsum('bmn,bmd->bnd', weights.astype(v.dtype), grad)
        return dq, dk, dv

    heads = (*map(_heads_first, (q, k, v)), out, norm, _heads_first(grad))
    dq, dk, dv = jax.lax.map(head, heads)
    return *(x.transpose(1, 2, 0, 3) for x in (dq, dk, dv)), None


by_head.defvjp(_forward, _backward)
