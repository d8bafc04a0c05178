import functools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax._src.cudnn import fused_attention_stablehlo

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


@pytest.mark.parametrize('kernel', [attention.dense, attention.flash])
def test_attention_sees_the_real_keys_only(kernel):
    args = inputs()
    np.testing.assert_allclose(kernel(*args), exact(*args), atol=2e-6)


def test_the_fused_kernels_head_padding_is_exact():
    args = inputs()
    out = attention.fused(*args, implementation='xla')  # cuDNN's arguments, on the CPU
    np.testing.assert_allclose(out, exact(*args), atol=2e-6)


@pytest.mark.parametrize('queries', [1, 2, 33])
def test_a_gpu_trains_with_any_number_of_queries(queries, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)  # needs a GPU
    loss = lambda *args: attention.fused(*args).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs(queries, jnp.bfloat16))
    assert '__cudnn$fmhaSoftmaxBackward' in traced.lower(lowering_platforms=('cuda',)).as_text()


def test_the_tpu_kernel_is_exact():
    args = inputs(queries=N)
    np.testing.assert_allclose(attention.splash(*args, interpret=True), exact(*args), atol=2e-5)


def with_gradients(kernel, q, k, v, lengths):
    """A kernel's output, and the gradients of q, k and v of a weighted sum of it."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    out, pullback = jax.vjp(lambda *qkv: kernel(*qkv, lengths), q, k, v)
    return out, *pullback(weight)


# heads * images 1 and 16: parts of keys or whole heads at a time; tiles of 48, groups of 192, ends of both
@pytest.mark.parametrize(
    ('images', 'heads', 'queries', 'keys', 'width'),
    [(1, 1, 1000, 1000, 64), (4, 4, 96, 200, 55), (2, 3, 5, 450, 8), (1, 2, 49, 64, 96)],
)
def test_gradients_on_a_cpu_are_those_of_plain_attention(images, heads, queries, keys, width):
    rng = np.random.default_rng(0)
    make = lambda rows: jnp.asarray(rng.normal(size=(images, heads, rows, width)), jnp.float32)
    args = make(queries), make(keys), make(keys), jnp.array([keys, keys // 5, 1, keys - 1][:images])
    results = [with_gradients(kernel, *args) for kernel in (attention.flash, attention.dense)]
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, atol=5e-6)


def test_padding_has_no_gradient_on_a_cpu():
    _, _, dk, dv = with_gradients(attention.flash, *inputs())
    assert not np.any(dk[1, :, 71:]) and not np.any(dv[1, :, 71:]) and np.all(dv[1, :, 70])


@pytest.mark.parametrize('place', [0, 70])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_infinities_and_nan_propagate_on_a_cpu(place, bad):
    """A loss that is not finite ends a run: it must not be hidden."""
    q, k, v, lengths = inputs()
    for args in (
        (q.at[0, 0, 5].set(bad), k, v),
        (q, k.at[0, 0, place].set(bad), v),
        (q, k, v.at[0, 0, place].set(bad)),
    ):
        ours, plain = (
            ~np.isfinite(kernel(*args, lengths)) for kernel in (attention.flash, attention.dense)
        )
        assert plain[0, 0].any()
        np.testing.assert_array_equal(ours, plain)


def test_scores_of_minus_infinity_alone_give_nan_on_a_cpu():
    q, k, v, lengths = inputs()
    q, k = q.at[0, 0, 5, 0].set(np.inf), k.at[..., 0].set(-1)
    ours, plain = (
        with_gradients(kernel, q, k, v, lengths) for kernel in (attention.flash, attention.dense)
    )
    assert np.isnan(ours[0][0, 0, 5]).all()
    for result, expected in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))


def test_lengths_out_of_range_do_no_harm_on_a_cpu():
    q, k, v, _ = inputs()
    out = attention.flash(q, k, v, jnp.array([10**6, 0]))
    np.testing.assert_array_equal(out[0], attention.flash(q, k, v, jnp.array([N, N]))[0])
    assert np.isnan(out[1]).all()  # no key to attend to, as in plain attention
    few, same = (attention.flash(q, k, v, jnp.array([N, 71], kind)) for kind in (jnp.uint8, jnp.int32))
    np.testing.assert_array_equal(few, same)


def test_infinities_and_nan_stay_within_their_image_on_a_cpu():
    q, k, v, lengths = inputs()
    for result in with_gradients(attention.flash, q, k.at[0].set(np.nan), v.at[0].set(np.inf), lengths):
        assert np.isfinite(result[1]).all() and not np.isfinite(result[0]).all()


def test_a_cpus_attention_refuses_shapes_that_do_not_fit():
    """Its kernel would read past the end of an array."""
    q, k, v, lengths = inputs()
    for args in (
        (q, k[..., 1:], v[..., 1:], lengths),
        (q, k, v[:, :, 1:], lengths),
        (q, k[:1], v[:1], lengths),
        (q, k[:, 1:], v[:, 1:], lengths),
        (q, k, v, lengths[:1]),
        (q, k, v, lengths[0]),
    ):
        with pytest.raises(ValueError, match='do not fit'):
            attention.flash(*args)


def test_attention_on_a_cpu_is_vectorised_by_vmap():
    q, k, v, lengths = inputs()
    args = jnp.stack([q, q + 1]), k, v, jnp.stack([lengths, lengths[::-1]])
    batched = lambda kernel: jax.vmap(functools.partial(with_gradients, kernel), (0, None, None, 0))(*args)
    for ours, plain in zip(batched(attention.flash), batched(attention.dense), strict=True):
        np.testing.assert_allclose(ours, plain, atol=5e-6)


def test_a_cpu_computes_short_sequences_in_one_product():
    calls = lambda keys: (
        'ffi_call'
        in str(jax.make_jaxpr(attention.flash)(*(jnp.ones((B, H, keys, d)),) * 3, jnp.full(B, keys)))
    )
    assert not calls(attention.SHORT - 1) and calls(attention.SHORT)


def test_scores_of_any_size_give_weights_that_sum_to_one_on_a_cpu():
    q, k, v, lengths = inputs()
    for scale in (0, 1e-3, 30, 1e4):
        out = attention.flash(q * scale, k, jnp.ones_like(v), lengths)
        np.testing.assert_allclose(out, 1, atol=1e-6)


ATTEND = """
import jax, numpy as np
from yolos_jax import attention
rng = np.random.default_rng(0)
q, k, v, weight = (np.float32(rng.normal(size=(1, 2, 700, 24))) for _ in range(4))
out, pullback = jax.vjp(lambda *qkv: attention.flash(*qkv, np.array([650])), q, k, v)
result = b''.join(np.asarray(x).tobytes() for x in (out, *pullback(weight)))
"""
ALONE = f"""
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
{ATTEND}
sys.stdout.buffer.write(result)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='one processor')
def test_a_cpus_results_do_not_depend_on_the_number_of_threads():
    one = subprocess.run([sys.executable, '-c', ALONE], check=True, cwd=ROOT, capture_output=True).stdout
    exec(ATTEND, here := {})
    assert len(one) == 4 * 4 * 2 * 700 * 24 and one == here['result']


def test_many_threads_and_devices_attend_at_once_on_a_cpu():
    args = inputs()
    expected, results = attention.flash(*args), []

    def attend(device):
        placed = jax.device_put(args, device)
        results.extend(jax.jit(attention.flash)(*placed) for _ in range(20))

    threads = [threading.Thread(target=attend, args=(device,)) for device in jax.devices() * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20 * 2 * len(jax.devices())
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_scores_of_bfloat16_are_not_rounded_to_it():
    q, k, _, lengths = inputs(dtype=jnp.bfloat16)
    exact_weights = attention.weights(*(x.astype(jnp.float32) for x in (q, k)), lengths)
    np.testing.assert_allclose(attention.weights(q, k, lengths), exact_weights, atol=1e-6)


def test_bfloat16_stays_near_float32():
    exact_out = attention.flash(*inputs())
    *qkv, lengths = inputs(dtype=jnp.bfloat16)
    out = attention.flash(*qkv, lengths)
    assert out.dtype == jnp.bfloat16
    ulp = 2**-8  # of bfloat16 below 1, where the outputs are; inputs and result are rounded
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
