"""float32 means float32: what the lowered programs ask of matrix units, read from their text."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, make_targets, noise

from yolos_jax import attention, optim, steps
from yolos_jax.model import Yolos, init_params, param_shapes
from yolos_jax.patches import patchify


def products(text):
    """(type of the first operand, precision) of every dot in a StableHLO program."""
    dots = re.findall(r'stablehlo\.dot_general .*', text)
    assert dots
    for dot in dots:
        kind = re.search(r': \(tensor<[\dx?]*(\w+)>', dot)[1]
        precision = re.search(r'precision = \[(\w+), (\w+)\]', dot)
        yield kind, set(precision.groups()) if precision else {'DEFAULT'}


def lowered(dtype, kernel):
    model = Yolos(**TINY, num_classes=5, dtype=dtype, attention_kernel=kernel)
    patches, grid = patchify([noise(128, 160), noise(128, 160, 1)], 80)
    batch = {'patches': patches, 'grid': grid} | make_targets([2, 1], 4, 5)[0]
    params = init_params(model, jax.random.key(0))
    optimizer = optim.make_optimizer(params, 1e-4)
    step = steps.make_train_step(model, optimizer, 1)
    return step.lower(steps.init_state(params, optimizer), batch).as_text()


@pytest.mark.parametrize('kernel', [attention.flash, attention.dense])
def test_every_product_of_a_float32_step_asks_for_the_highest_precision(kernel):
    kinds = {(dot[0], *dot[1]) for dot in products(lowered(jnp.float32, kernel))}
    assert kinds == {('f32', 'HIGHEST')}


def test_no_bfloat16_product_asks_for_more_than_it_holds():
    dots = list(products(lowered(jnp.bfloat16, attention.flash)))
    assert {tuple(precision) for kind, precision in dots if kind == 'bf16'} == {('DEFAULT',)}
    # exact in float32: the heads, three layers each, forward and backward, and the bicubic matrices
    exact = [dot for dot in dots if dot[0] == 'f32']
    assert {tuple(precision) for _, precision in exact} == {('HIGHEST',)}
    assert len(exact) <= 2 * 3 * 3 + 8


def test_float32_never_goes_to_a_fused_kernel():
    assert attention.for_platform('gpu', jnp.float32) is attention.dense
    assert attention.for_platform('tpu', jnp.float32) is attention.dense
    assert attention.for_platform('gpu', jnp.bfloat16) is attention.fused
    assert attention.for_platform('tpu', jnp.bfloat16) is attention.splash
    for dtype in (jnp.float32, jnp.bfloat16):
        assert attention.for_platform('cpu', dtype) is attention.flash


@pytest.mark.parametrize(
    ('platform', 'capability', 'kernel'),
    [
        ('gpu', '9.0', attention.fused),
        ('cuda', '9.0', attention.fused),
        ('gpu', '8.0', attention.fused),
        ('gpu', '7.5', attention.dense),
        ('gpu', 'gfx942', attention.dense),
        ('tpu', None, attention.splash),
        ('METAL', None, attention.dense),
    ],
)
def test_the_attention_kernel_is_chosen_by_platform_and_capability(platform, capability, kernel):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert attention.for_platform(attention.platform_of(device), jnp.bfloat16) is kernel


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_a_detector_is_exported_for_another_platform_than_this(platform):
    kernel = attention.for_platform('gpu' if platform == 'cuda' else platform, jnp.float32)
    model = Yolos(**TINY, num_classes=5, attention_kernel=kernel)
    shapes = param_shapes(model)
    batch = {
        'patches': jax.ShapeDtypeStruct((2, 30, 768), np.uint8),
        'grid': jax.ShapeDtypeStruct((2, 2), np.int32),
    }
    exported = jax.export.export(steps.make_predict_step(model), platforms=[platform])(shapes, batch)
    assert exported.platforms == (platform,) and exported.out_avals[0].shape == (2, 7, 4)


def test_the_tpu_kernel_is_in_a_program_exported_for_tpus():
    """Traced on a CPU: nothing asks which platform this is."""
    kernel = attention.for_platform('tpu', jnp.bfloat16)
    model = Yolos(**TINY, num_classes=5, attention_kernel=kernel, dtype=jnp.bfloat16)
    batch = {
        'patches': jax.ShapeDtypeStruct((2, 120, 768), np.uint8),
        'grid': jax.ShapeDtypeStruct((2, 2), np.int32),
    }
    step = steps.make_predict_step(model)
    text = jax.export.export(step, platforms=['tpu'])(param_shapes(model), batch).mlir_module()
    assert 'tpu_custom_call' in text
