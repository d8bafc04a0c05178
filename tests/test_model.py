import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import TINY, forward, make_hf, noise, reference_tensors, to_torch

from yolos_jax import attention, model, posembed
from yolos_jax.block import Block, LayerNorm
from yolos_jax.model import Yolos, init_params
from yolos_jax.ops import add_bias, gelu, layer_norm
from yolos_jax.patches import patchify
from yolos_jax.vit import PatchEmbed
from yolos_jax.weights import names

PUBLISHED = {
    'YOLOS_TI': (6_488_736, 163),
    'YOLOS_S': (30_684_768, 164),
    'YOLOS_S_DWR': (27_561_696, 188),
    'YOLOS_B': (127_798_368, 164),
}


def init(yolos, seed=0):
    return init_params(yolos, jax.random.key(seed))


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_exact_parameter_count(name):
    yolos = Yolos(**getattr(model, name))
    batch = np.zeros((1, 1, 768), np.uint8), np.ones((1, 2), np.int32)
    shapes = jax.eval_shape(yolos.init, jax.random.key(0), *batch)
    parameters, _ = PUBLISHED[name]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize('name', ['YOLOS_TI', 'YOLOS_S'])
def test_logits_and_boxes_are_those_of_transformers(name):
    """With fewer blocks and positions; on their own grid, and on others that they are resampled to."""
    fields = getattr(model, name)
    fields = fields | {key: (10, 17) for key in fields if 'grid' in key} | {'depth': 4}
    hf = make_hf(fields)
    yolos = Yolos(**fields, eps=1e-12)
    params = names.to_params(reference_tensors(hf), yolos)
    apply = jax.jit(yolos.apply)
    for rows, columns in (fields['pos_grid'], (7, 21), (21, 7)):
        image = noise(16 * rows, 16 * columns)
        with torch.no_grad():
            expected = hf(pixel_values=to_torch(image))
        out = apply({'params': params}, *patchify([image]))
        assert expected.logits.abs().max() > 0.5  # the comparison means something
        np.testing.assert_allclose(out['pred_logits'], expected.logits, atol=1e-5)
        np.testing.assert_allclose(out['pred_boxes'], expected.pred_boxes, atol=2e-6)


@pytest.mark.parametrize('grid', [(4, 6), (3, 5)])
def test_each_level_is_that_of_transformers(grid):
    """Embedding, every block, final norm: where a difference starts, not only that there is one."""
    hf = make_hf(TINY, num_classes=5)
    yolos = Yolos(**TINY, num_classes=5, eps=1e-12)
    image = noise(16 * grid[0], 16 * grid[1])
    seen = []
    for layer in hf.vit.encoder.layer:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach().numpy()))
    with torch.no_grad():
        hf(pixel_values=to_torch(image))

    # ours is [CLS, DET, patches], theirs [CLS, patches, DET]
    Q, N = TINY['num_det_tokens'], grid[0] * grid[1]
    order = np.concatenate([[0], 1 + Q + np.arange(N), 1 + np.arange(Q)])
    backbone = names.to_params(reference_tensors(hf), yolos)['backbone']
    for depth, expected in enumerate(seen):
        ours = run_blocks(yolos, backbone, image, depth)
        np.testing.assert_allclose(ours[order], expected, atol=5e-6)


def run_blocks(yolos, backbone, image, depth):
    """The sequence [S, D] that goes into block `depth`, by our own layers put together here."""
    patches, grid = patchify([image])
    layout = posembed.layout(yolos.pos_grid, jnp.asarray(grid), patches.shape[1])
    Q = yolos.num_det_tokens

    def positions(table):
        special = jnp.concatenate([table[0, :1], table[0, -Q:]])
        return posembed.sequences(special, table[0, 1:-Q].reshape(*yolos.pos_grid, -1), layout)[0]

    embed = PatchEmbed(yolos.width, jnp.float32)
    tokens = embed.apply({'params': backbone['patch_embed']}, patches)[0]
    x = jnp.concatenate([backbone['cls_token'][0], backbone['det_token'][0], tokens])
    x = (x + positions(jnp.asarray(backbone['pos_embed'])))[None]
    block = Block(yolos.heads, yolos.eps, jnp.float32)
    for i in range(depth):
        params = jax.tree.map(lambda p, i=i: p[i], backbone['blocks'])
        x = block.apply({'params': params}, x, jnp.array([x.shape[1]]))
        x = x + positions(jnp.asarray(backbone['mid_pos_embed'][i]))
    return np.asarray(x[0])


def test_padding_never_changes_a_detection():
    yolos = Yolos(**TINY, num_classes=5)
    params = init(yolos)
    images = [noise(16 * r, 16 * c, r) for r, c in ((4, 6), (6, 3), (5, 5), (1, 9), (9, 1))]
    apply = jax.jit(yolos.apply)
    alone = [apply({'params': params}, *patchify([image])) for image in images]
    for length in (25, 26, 40, 160):
        together = apply({'params': params}, *patchify(images, length))
        for i, one in enumerate(alone):
            for key in one:
                np.testing.assert_allclose(together[key][i], one[key][0], atol=1e-5)


def test_garbage_in_the_padding_never_changes_a_detection():
    yolos = Yolos(**TINY, num_classes=5)
    params = init(yolos)
    patches, grid = patchify([noise(64, 96)], 40)
    clean = forward(yolos, params, patches, grid)
    patches[0, 24:] = 255
    dirty = forward(yolos, params, patches, grid)
    np.testing.assert_array_equal(clean['pred_logits'], dirty['pred_logits'])


def test_rematerialisation_changes_memory_and_nothing_else():
    batch = patchify([noise(64, 96)], 30)
    losses, gradients, outputs = [], set(), []
    for remat in (0, 1, 2, 5):
        yolos = Yolos(**TINY, num_classes=5, remat=remat)
        params = init(yolos)
        loss = lambda p, y=yolos: y.apply({'params': p}, *batch)['pred_logits'].sum()
        losses.append(jax.jit(jax.value_and_grad(loss))(params))
        gradients.add(text := str(jax.make_jaxpr(jax.grad(loss))(params)))
        assert ('remat' in text) == bool(remat)
        outputs.append(forward(yolos, params, *batch)['pred_logits'])
    assert len(gradients) == 3  # one block is not two, and those before the last are all
    assert all((other == outputs[0]).all() for other in outputs)
    kept, *others = map(jax.tree.leaves, losses)
    for other in others:
        for a, b in zip(kept, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_jax_enable_x64_changes_no_parameter():
    yolos = Yolos(**TINY, registers=2)
    params = init(yolos)
    with jax.enable_x64(True):
        wide = init(yolos)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), wide, params)


ROTARY = {'pos_grid': None, 'mid_pos_grid': None, 'rope': True}


@pytest.mark.parametrize(('fields', 'kernel'), [({}, attention.dense), (ROTARY, attention.flash)])
def test_gradients_pass_through_what_is_around_the_model(fields, kernel):
    yolos = Yolos(**TINY | fields, attention_kernel=kernel)
    patches, grid = patchify([noise(64, 80)])
    params = init(yolos)

    def loss(params, grid):
        return yolos.apply({'params': params}, patches, grid)['pred_logits'].sum()

    def around(params):
        inner = jax.checkpoint(jax.jit(loss))
        return jax.lax.scan(lambda total, grid: (total + inner(params, grid), None), 0.0, grid[None])[0]

    both = jax.jit(lambda params: (jax.grad(around)(params), jax.grad(loss)(params, grid)))
    grads, expected = both(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, expected)


@pytest.mark.parametrize('remat', [0, 1])
def test_no_tracer_outlives_its_trace(remat):
    yolos = Yolos(**TINY, remat=remat)
    params = init(yolos)
    with jax.checking_leaks():
        jax.jit(yolos.apply).trace({'params': params}, *patchify([noise(64, 80)]))


def test_a_forward_pass_reads_the_blocks_where_they_are():
    yolos = Yolos(**{**TINY, 'width': 128, 'depth': 8, 'mid_pos_grid': None}, num_classes=5)
    params = init(yolos)
    size = sum(x.nbytes for x in jax.tree.leaves(params['backbone']['blocks']))
    compiled = jax.jit(yolos.apply).lower({'params': params}, *patchify([noise(32, 32)], 4)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2  # `jax.lax.scan` copies 7 of 8


def test_bfloat16_keeps_parameters_and_outputs_in_float32():
    yolos = Yolos(**TINY, num_classes=5, dtype=jnp.bfloat16)
    params = init(yolos)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    batch = patchify([noise(64, 96)], 30)
    out = forward(yolos, params, *batch)
    exact = forward(yolos.clone(dtype=jnp.float32), params, *batch)
    assert out['pred_logits'].dtype == jnp.float32
    difference = np.abs(out['pred_logits'] - exact['pred_logits']).max()
    assert 0 < difference < 0.05 * np.abs(exact['pred_logits']).max()


@pytest.mark.parametrize('kernel', [attention.dense, attention.flash])
def test_the_tokens_of_a_bfloat16_model_are_bfloat16(kernel):
    """Before the blocks and after them; of float32 they would take twice the memory."""
    yolos = Yolos(**TINY, num_classes=5, dtype=jnp.bfloat16, attention_kernel=kernel)
    seen = lambda _, name: name in ('embed', 'encode')
    kept = dict(mutable=['intermediates'], capture_intermediates=seen)
    apply = lambda params: yolos.apply({'params': params}, *patchify([noise(64, 96)]), **kept)[1]
    tokens = jax.tree.leaves(jax.eval_shape(apply, model.param_shapes(yolos)))
    assert [x.dtype for x in tokens] == [jnp.bfloat16] * 2


def test_patches_are_row_major_pixels():
    image = noise(32, 48)
    patches, grid = patchify([image], 8)
    assert patches.shape == (1, 8, 768) and grid.tolist() == [[2, 3]]
    np.testing.assert_array_equal(patches[0, 4].reshape(16, 16, 3), image[16:32, 16:32])
    assert not patches[0, 6:].any()


@pytest.mark.parametrize(
    ('image', 'length', 'says'),
    [
        (noise(32, 40), None, 'multiples of 16'),
        (noise(32, 48).astype(np.float32), None, 'float32'),
        (noise(32, 48)[:0], None, 'image 0 is 0x48'),
        (noise(32, 48), 5, '6 patches'),
        (noise(16, 3200), None, 'too long'),
    ],
)
def test_patchify_names_what_is_wrong(image, length, says):
    with pytest.raises(ValueError, match=says):
        patchify([image], length)


@pytest.mark.parametrize(
    'patches',
    [np.zeros((1, 4, 768), np.float32), np.zeros((4, 768), np.uint8), np.zeros((1, 4, 588), np.uint8)],
)
def test_the_model_takes_pixels_and_not_floats(patches):
    with pytest.raises(ValueError, match='uint8'):
        Yolos(**TINY).init(jax.random.key(0), patches, np.full((1, 2), 2))


def test_a_width_that_does_not_divide_into_heads_is_named():
    for heads, rope in ((3, False), (16, True)):
        with pytest.raises(ValueError, match=f'32 is not a multiple of heads {heads}'):
            model.param_shapes(Yolos(**TINY | {'heads': heads}, rope=rope))


def test_fresh_layers_and_tokens_are_as_large_as_torchs_and_the_references():
    params = init(Yolos(**TINY))
    backbone = params['backbone']
    dense = [(params['bbox_embed'][f'layers_{i}'], 32) for i in range(3)]
    for layer, inputs in [*dense, (backbone['patch_embed']['proj'], 768)]:
        largest = max(float(np.abs(x).max()) for x in layer.values())
        assert 0.9 * inputs**-0.5 < largest <= inputs**-0.5 and layer['bias'].any()
    for name in ('det_token', 'mid_pos_embed'):
        assert float(backbone[name].std()) == pytest.approx(0.02, rel=0.2)
    table, patches = backbone['pos_embed'][0], 4 * 6
    np.testing.assert_array_equal(table[1 : 1 + patches], posembed.sine((4, 6), 32))
    assert 0.01 < float(jnp.std(table[1 + patches :])) < 0.03  # of [DET] tokens
    first, *others = backbone['blocks']['mlp']['fc1']['kernel']
    assert not any((first == other).any() for other in others)


def test_padding_for_a_kernel_is_no_feature():
    kernel = functools.partial(attention.fused, implementation='xla')
    vit = model.Vit(width=32, depth=2, heads=2, pos_grid=(4, 6), attention_kernel=kernel)
    batch = patchify([noise(64, 96)])
    features = jax.eval_shape(vit.init_with_output, jax.random.key(0), *batch)[0]
    assert features['patches'].shape == (1, 24, 32)


def test_gelu_and_its_slope_are_torchs():
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    theirs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = torch.nn.functional.gelu(theirs)
    value.sum().backward()
    np.testing.assert_allclose(gelu(x), value.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(x), theirs.grad.numpy(), atol=1e-6)
    half = jnp.bfloat16(x)
    for function in (gelu, jax.vmap(jax.grad(gelu))):  # of the same numbers in float32, rounded at the end
        np.testing.assert_array_equal(function(half), function(jnp.float32(half)).astype(jnp.bfloat16))


def test_a_norm_and_its_gradients_are_torchs():
    rng = np.random.default_rng(0)
    x, grad = (rng.normal(1, 2, (2, 3, 64)).astype(np.float32) for _ in range(2))
    scale, bias = (rng.normal(1, 1, 64).astype(np.float32) for _ in range(2))
    inputs = [torch.tensor(y, dtype=torch.float64, requires_grad=True) for y in (x, scale, bias)]
    value = torch.nn.functional.layer_norm(inputs[0], (64,), *inputs[1:], eps=1e-6)
    value.backward(torch.tensor(grad, dtype=torch.float64))
    ours, gradients = jax.vjp(functools.partial(layer_norm, eps=1e-6), x, scale, bias)
    np.testing.assert_allclose(ours, value.detach().numpy(), atol=2e-6)
    for gradient, theirs in zip(gradients(jnp.asarray(grad)), inputs, strict=True):
        np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=2e-6)


def test_a_norm_of_bfloat16_is_that_of_the_same_numbers_in_float32():
    x = np.random.default_rng(0).normal(1, 2, (2, 3, 64))
    x[0, 0] = 1001.0  # no variance at all
    half = jnp.asarray(x, jnp.bfloat16)
    for eps in (1e-6, 0.1):
        norm = LayerNorm(eps)
        params = norm.init(jax.random.key(0), half)
        exact = norm.apply(params, jnp.float32(half))
        np.testing.assert_allclose(norm.apply(params, half), exact, atol=1e-5)
    equal = jnp.broadcast_to(jnp.arange(100.0, 200)[:, None], (100, 330)).astype(jnp.bfloat16)
    assert jnp.isfinite(layer_norm(equal, jnp.ones(330), jnp.zeros(330), 1e-6)).all()


def test_the_gradient_of_a_bias_of_heads_is_a_sum_over_images_and_tokens():
    x, grad = (np.random.default_rng(i).normal(size=(3, 2, 5, 4)).astype(np.float32) for i in range(2))
    y, gradients = jax.vjp(add_bias, x, x[0, :, 0])
    np.testing.assert_array_equal(y, x + x[0, :, :1])
    np.testing.assert_allclose(gradients(grad)[1], grad.sum(axis=(0, 2)), rtol=1e-5)


def test_sums_over_a_batch_do_not_choose_the_layout_of_the_model():
    yolos = Yolos(**TINY, attention_kernel=functools.partial(attention.fused, implementation='xla'))
    patches, grid = patchify([noise(64, 80)] * 3)
    loss = lambda params: yolos.apply({'params': params}, patches, grid)['pred_logits'].sum()
    lines = jax.jit(jax.grad(loss)).lower(init(yolos)).as_text().splitlines()
    sums = [
        re.search(r'reduce\((%\w+) .*stablehlo.add.* dimensions = \[0\] : \(tensor<3x\d+x', x)
        for x in lines
    ]
    summed = {match[1] for match in sums if match}
    assert summed
    assert {x.split()[0] for x in lines if '@LayoutConstraint' in x} >= summed


@pytest.mark.parametrize(
    'kernel',
    [
        pytest.param(functools.partial(attention.splash, interpret=True), id='TPU'),
        pytest.param(functools.partial(attention.fused, implementation='xla'), id='GPU'),
    ],
)
def test_padding_and_unrolling_for_a_kernel_change_no_gradient(kernel):
    """Longer sequences, blocks as a loop or not; the kernels in forms that run here."""
    assert attention.unrolls(kernel) and not attention.unrolls(attention.dense)
    patches, grid = patchify([noise(64, 80)])
    special = 1 + TINY['num_det_tokens']
    assert attention.padded(kernel, special + patches.shape[1]) > special + patches.shape[1]
    grads = []
    for each in (kernel, attention.dense):
        yolos = Yolos(**TINY | {'depth': 3}, attention_kernel=each)
        apply = lambda params, yolos=yolos: yolos.apply({'params': params}, patches, grid)
        grads.append(jax.jit(jax.grad(lambda p, f=apply: f(p)['pred_logits'].sum()))(init(yolos)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *grads)
