import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yolos_jax import attention

B, M, N, H, d = 2, 33, 160, 3, 11


def inputs(queries=M, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    make = lambda rows: jnp.asarray(rng.normal(size=(B, H, rows, d)), dtype)
    return make(queries), make(N), make(N), jnp.array([N, 71])


def exact(q, k, v, lengths):
    """One image, head and query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h, m in np.ndindex(*q.shape[:3]):
        scores = k[b, h, : lengths[b]] @ q[b, h, m] / np.sqrt(d)
        weights = np.exp(scores - scores.max())
        out[b, h, m] = weights / weights.sum() @ v[b, h, : lengths[b]]
    return out


@pytest.mark.parametrize('kernel', [attention.dense, attention.by_head])
def test_attention_sees_the_real_keys_only(kernel):
    args = inputs()
    np.testing.assert_allclose(kernel(*args), exact(*args), atol=2e-6)


def test_the_fused_kernels_head_padding_is_exact():
    args = inputs()
    out = attention.fused(*args, implementation='xla')  # cuDNN's arguments, on the CPU
    np.testing.assert_allclose(out, exact(*args), atol=2e-6)


def test_the_tpu_kernel_is_exact():
    args = inputs(queries=N)
    np.testing.assert_allclose(attention.splash(*args, interpret=True), exact(*args), atol=2e-5)


def test_gradients_by_head_are_those_of_plain_attention():
    *qkv, lengths = inputs()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, H, M, d)), jnp.float32)
    grads = [
        jax.grad(lambda *x, f=f: (f(*x, lengths) * weight).sum(), argnums=(0, 1, 2))(*qkv)
        for f in (attention.by_head, attention.dense)
    ]
    for ours, plain in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, plain, atol=5e-6)


def test_a_cpu_computes_heads_one_by_one_when_there_are_many_scores():
    def loops(batch, tokens):
        x, lengths = jax.ShapeDtypeStruct((batch, H, tokens, d), 'float32'), jnp.ones(batch, jnp.int32)
        text = str(jax.make_jaxpr(lambda x: attention.cached(x, x, x, lengths))(x))
        return 'scan' in text

    few = int((attention.FEW / H) ** 0.5)
    assert not loops(1, few) and loops(1, few + 1) and loops(2, few)


def test_long_sequences_take_their_queries_in_parts():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1, 2950, 8)), jnp.float32) for _ in range(3))
    args = q, k, v, jnp.array([2800])
    assert q.shape[2] * k.shape[2] > attention.CACHED and q.shape[2] % attention.ROWS
    np.testing.assert_allclose(attention.by_head(*args), attention.dense(*args), atol=1e-6)


def test_bfloat16_stays_near_float32():
    exact_out = attention.by_head(*inputs())
    *qkv, lengths = inputs(dtype=jnp.bfloat16)
    out = attention.by_head(*qkv, lengths)
    assert out.dtype == jnp.bfloat16
    ulp = 2**-8  # of bfloat16 below 1, where the outputs are; inputs, weights and result are rounded
    np.testing.assert_allclose(out.astype(jnp.float32), exact_out, atol=3 * ulp)


@pytest.mark.parametrize(
    ('size', 'block'), [(101, 128), (1000, 1024), (1408, 768), (1472, 768), (2560, 640), (4352, 896)]
)
def test_blocks_of_the_tpu_kernel_are_large_and_pad_little(size, block):
    assert attention.splash_block(size) == block and block % 128 == 0
    assert -size % block <= 0.1 * size or size < 1024


def test_the_tpu_kernel_is_exact_in_several_blocks():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 1, 1100, d)), jnp.float32) for _ in range(3))
    args = q, k, v, jnp.array([1001])
    np.testing.assert_allclose(attention.splash(*args, interpret=True), attention.dense(*args), atol=2e-5)
