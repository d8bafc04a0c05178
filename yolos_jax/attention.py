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
from yolos_jax.patches import round_up

SHORT = 64  # keys, below which a CPU computes all scores of a batch in one product
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
        return flash
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return {'tpu': splash, 'gpu': fused}.get(platform, dense) if is_half else dense


def unrolls(kernel: Callable) -> bool:
    """Whether the loop over the model's blocks is unrolled with this kernel.

    In a loop a GPU or TPU copies what the backward pass needs to a stack and back. Unrolled, YOLOS-S
    trains with 386 images/s instead of 300 on an H200, and on a TPU takes 23 ms outside the kernel instead
    of 29, by estimate (docs/experiments.md).
    """
    return _is(kernel, fused) or _is(kernel, splash)


def heads_first(kernel: Callable) -> bool:
    """Whether heads come before tokens in the memory of the kernel's device: they do on a TPU."""
    return _is(kernel, splash)


def reads_rows(kernel: Callable) -> bool:
    """Whether rows of a table are read one by one on the device of this kernel: a CPU is faster so."""
    return _is(kernel, flash)


def padded(kernel: Callable, size: int) -> int:
    """The length that sequences of `size` are padded to for this kernel, once and not in every block."""
    if _is(kernel, splash):
        return round_up(size, splash_block(size))
    return round_up(size, FUSED_MULTIPLE) if _is(kernel, fused) else size


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
    is_real = jnp.arange(k.shape[2]) < lengths[:, None]  # [B, N]
    scores = jnp.where(is_real[:, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def fused(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, implementation: str = 'cudnn'
) -> jax.Array:
    """cuDNN's flash attention, of a number of keys that is even; heads are padded to a multiple of 8."""
    # divided by JAX the kernel has an address of this process in it: no start would find its program again
    return spmd.over_batch(functools.partial(_fused, implementation=implementation))(q, k, v, lengths)


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, implementation: str) -> jax.Array:
    _, _, M, width = q.shape
    pad = lambda x, rows: jnp.pad(x, [(0, 0), (0, 0), (0, rows), (0, -width % 8)]).swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        pad(q, M % 2),  # JAX refuses the gradient of an odd number of queries
        pad(k, 0),
        pad(v, 0),
        scale=width**-0.5,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[:, :M, :, :width].swapaxes(1, 2)


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
        return round_up(size, 128)  # the kernel asks for multiples of 128
    return min(BLOCKS, key=lambda block: (-size % block, -block))


def flash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """A CPU's block kernel (`kernels.flash`), in float32 whatever the type; `dense` for short sequences."""
    if k.shape[2] < SHORT:
        return dense(q, k, v, lengths)
    float32 = (x.astype(jnp.float32) for x in (q, k, v))
    return spmd.over_batch(_flash)(*float32, lengths.astype(jnp.int32)).astype(v.dtype)


@jax.custom_vjp
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    return _flash_forward(q, k, v, lengths)[0]


def _flash_forward(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple:
    from yolos_jax.kernels import flash as kernel  # here, as its first import compiles it

    out, norm = kernel.attend(q, k, v, lengths)
    return out, (q, k, v, lengths, out, norm)


def _flash_backward(saved: tuple, grad: jax.Array) -> tuple:
    from yolos_jax.kernels import flash_backward as kernel

    return *kernel.gradients(*saved, grad), None


_flash.defvjp(_flash_forward, _flash_backward)
