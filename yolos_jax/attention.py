"""Self-attention over sequences whose padding sits at the end: one function per kernel.

Every kernel computes softmax(q k^T / sqrt(d)) v, with the keys from `lengths` on masked out.
q is [B, H, M, d], k and v are [B, H, N, d], lengths is int32 [B] with 1 <= lengths <= N.

Letters: B batch, M queries, N keys, H heads, d head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from yolos_jax import spmd

MASKED = -1e30  # a score whose weight is 0
FEW = 2**21  # `cached` computes all heads of a batch at once up to this many scores: 8 MB
CACHED = 2**23  # `by_head` computes a head at once up to this many scores an image: 32 MB, 2,900 tokens
ROWS = 256  # queries that `by_head` takes at a time beyond that
AMPERE = 8.0  # the compute capability of NVIDIA's first GPUs with bfloat16
FUSED_MULTIPLE = 8  # the lengths of sequences for `fused` are multiples of this, as in all measurements
BLOCKS = 512, 640, 768, 896, 1024  # sides for `splash`: with its default, 128, a TPU idles most of the time


def platform_of(device: jax.Device) -> str:
    """The name of a device's platform for `for_platform`: 'cpu', 'tpu', 'gpu' or 'old gpu'.

    A 'gpu' has cuDNN's attention and bfloat16: NVIDIA's from Ampere on, but no T4 or V100, and no AMD.
    """
    if device.platform not in ('gpu', 'cuda', 'rocm'):
        return device.platform
    try:
        return 'gpu' if float(device.compute_capability) >= AMPERE else 'old gpu'
    except ValueError:  # AMD's is a name such as gfx942
        return 'old gpu'


def for_platform(platform: str, dtype: jnp.dtype) -> Callable:
    """The kernel for a platform (`platform_of`) and the type of the activations.

    float32 is for exact work: it never goes to a fused kernel, whose products are rounded to bfloat16
    or TF32.
    """
    if platform == 'cpu':
        return cached
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return {'tpu': splash, 'gpu': fused}.get(platform, dense) if is_half else dense


def unrolls(kernel: Callable) -> bool:
    """Whether the loop over the model's blocks is unrolled with this kernel.

    In a loop a GPU or TPU copies what the backward pass needs to a stack and back. Unrolled, YOLOS-S
    trains with 386 images/s instead of 300 on an H200, and on a TPU takes 23 ms outside the kernel instead
    of 29, by estimate (docs/measurements.md).
    """
    return _is(kernel, fused) or _is(kernel, splash)


def heads_first(kernel: Callable) -> bool:
    """Whether heads come before tokens in the memory of the kernel's device: they do on a TPU."""
    return _is(kernel, splash)


def padded(kernel: Callable, size: int) -> int:
    """The length that sequences of `size` are padded to for this kernel, once and not in every block."""
    if _is(kernel, splash):
        return size + -size % splash_block(size)
    return size + -size % FUSED_MULTIPLE if _is(kernel, fused) else size


def _is(kernel: Callable, function: Callable) -> bool:
    """Whether a kernel is this function or a functools.partial of it."""
    return getattr(kernel, 'func', kernel) is function


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The precision of matrix products of a type: by default GPUs and TPUs round float32."""
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def dense(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Plain products: every score in memory at once, softmax in float32."""
    of_keys = weights(q, k, lengths).astype(v.dtype)
    return jnp.einsum('bhmn,bhnd->bhmd', of_keys, v, precision=precision(q.dtype))


def weights(q: jax.Array, k: jax.Array, lengths: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)), [B, H, M, N] in float32."""
    exact = precision(q.dtype)
    scores = jnp.einsum('bhmd,bhnd->bhmn', q, k, preferred_element_type=jnp.float32, precision=exact)
    scores = jnp.where(_is_real(k, lengths)[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def fused(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, implementation: str = 'cudnn'
) -> jax.Array:
    """cuDNN's flash attention; head widths are padded to the multiple of 8 it asks for."""
    width = q.shape[-1]
    pad = [(0, 0)] * 3 + [(0, -width % 8)]
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, pad).swapaxes(1, 2) for x in (q, k, v)),
        scale=width**-0.5,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[..., :width].swapaxes(1, 2)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, interpret: bool = False
) -> jax.Array:
    """The TPU's block kernel; `dense` for a model's last block, whose queries are too few for it."""
    if q.shape[2] != k.shape[2]:
        return dense(q, k, v, lengths)
    return spmd.over_batch(functools.partial(_splash, interpret=interpret))(q, k, v, lengths)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, H, M, d = q.shape
    block = splash_block(M)
    pad = [(0, 0), (0, 0), (0, -M % block), (0, 0)]
    q, k, v = (jnp.pad(x, pad) for x in (q * d**-0.5, k, v))
    size = q.shape[2]
    mask = masks.MultiHeadMask([masks.FullMask((size, size))] * H)
    names = 'block_q block_kv block_q_dkv block_kv_dkv block_q_dq block_kv_dq'.split()
    sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
    attend = kernel.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    padding = (jnp.arange(size) >= lengths[:, None]).astype(jnp.int32)
    segments = kernel.SegmentIds(q=jnp.zeros_like(padding), kv=padding)
    return jax.vmap(attend)(q, k, v, segments)[:, :, :M]


def splash_block(size: int) -> int:
    """The side of the blocks that `splash` cuts a sequence into.

    Up to 1,024 tokens are one block. A longer sequence gets the side of `BLOCKS` that pads it least; if
    several do, the largest.
    """
    if size <= BLOCKS[-1]:
        return size + -size % 128  # the kernel asks for multiples of 128
    return min(BLOCKS, key=lambda block: (-size % block, -block))


def _is_real(k: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.arange(k.shape[2]) < lengths[:, None]  # [B, N]


def cached(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """All heads at once if their scores fit a CPU's cache, otherwise one head at a time.

    With its gradient, attention to all heads at once takes 0.5 to 0.9 of the time of one head after the
    other up to `FEW` scores, and 1.2 to 1.7 times as long beyond (docs/measurements.md).
    """
    B, H, M, _ = q.shape
    return (dense if B * H * M * k.shape[2] <= FEW else by_head)(q, k, v, lengths)


@jax.custom_vjp
def by_head(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """One head at a time, scores computed again in the backward pass.

    XLA on a CPU keeps a head's scores in cache and never stores all of them: a training step of
    YOLOS-Ti takes 0.6 of the time and 0.4 of the memory of `dense`.
    """
    return _forward(q, k, v, lengths)[0]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    exact = precision(q.dtype)
    return jnp.einsum('bmd,bnd->bmn', q, k, preferred_element_type=jnp.float32, precision=exact)


def _with_mask(q: jax.Array, k: jax.Array, lengths: jax.Array) -> tuple:
    """q [H, B, M, d + 1] and k [H, B, N, d + 1], whose products are the scaled and masked scores.

    The mask is one more column and not another pass over the scores: attention takes 0.84 of the time for
    YOLOS-Ti and -S, and 0.91 with its gradient (docs/measurements.md). The plain form is `dense`.
    """
    mask = jnp.where(_is_real(k, lengths), 0, MASKED).astype(k.dtype)[:, None, :, None]
    k = jnp.concatenate([k, jnp.broadcast_to(mask, (*k.shape[:3], 1))], axis=-1)
    q = jnp.concatenate([q * q.shape[-1] ** -0.5, jnp.ones_like(q[..., :1])], axis=-1)
    return q.swapaxes(0, 1), k.swapaxes(0, 1)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple:
    exact, (B, _, M, _), N = precision(q.dtype), q.shape, k.shape[2]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        scores = _scores(q, k)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum('bmn,bnd->bmd', weights.astype(v.dtype), v, precision=exact)
        return out / total.astype(v.dtype), top + jnp.log(total)

    def head(args: tuple) -> tuple:
        q, k, v = args
        if M * N <= CACHED:
            return attend(q, k, v)
        parts = -(-M // ROWS)
        q = jnp.pad(q, [(0, 0), (0, parts * ROWS - M), (0, 0)])
        q = q.reshape(B, parts, ROWS, -1).swapaxes(0, 1)  # [parts, B, ROWS, d + 1]
        out, norm = jax.lax.map(lambda q: attend(q, k, v), q)
        whole = lambda x: x.swapaxes(0, 1).reshape(B, parts * ROWS, -1)[:, :M]
        return whole(out), whole(norm)

    out, norm = jax.lax.map(head, (*_with_mask(q, k, lengths), v.swapaxes(0, 1)))
    return out.swapaxes(0, 1), (q, k, v, lengths, out, norm)


def _backward(saved: tuple, grad: jax.Array) -> tuple:
    q, k, v, lengths, out, norm = saved
    d, exact = q.shape[-1], precision(q.dtype)

    def head(args: tuple) -> tuple:
        q, k, v, out, norm, grad = args
        weights = jnp.exp(_scores(q, k) - norm)
        d_weights = _scores(grad, v)
        inner = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - inner)).astype(q.dtype)
        dq = jnp.einsum('bmn,bnd->bmd', d_scores, k[..., :d], precision=exact) * d**-0.5
        dk = jnp.einsum('bmn,bmd->bnd', d_scores, q[..., :d], precision=exact)
        dv = jnp.einsum('bmn,bmd->bnd', weights.astype(v.dtype), grad, precision=exact)
        return dq, dk, dv

    q, k = _with_mask(q, k, lengths)
    dq, dk, dv = jax.lax.map(head, (q, k, v.swapaxes(0, 1), out, norm, grad.swapaxes(0, 1)))
    return *(x.swapaxes(0, 1) for x in (dq, dk, dv)), None


by_head.defvjp(_forward, _backward)
