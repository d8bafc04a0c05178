import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, make_targets, noise
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.layout import Format, Layout

from benchmarks.collectives import collectives
from yolos_jax import attention, optim, steps
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import patchify
from yolos_jax.run import mesh as meshes

B = 16


MODEL = Yolos(**TINY, num_classes=5)


def make_batch():
    """16 images, four without objects and four with too many."""
    patches, grid = patchify([noise(64, 96, i) for i in range(B)], 30)
    return {'patches': patches, 'grid': grid} | make_targets([3, 1, 0, 9] * 4, 9, 5)[0]


@functools.cache
def start(model):
    """The optimiser of a model, and its first state."""
    patches, grid = make_batch()['patches'][:1], make_batch()['grid'][:1]
    params = jax.jit(model.init)(jax.random.key(0), patches, grid)['params']
    # at the recipe's learning rate, since AdamW makes whole steps of rounding errors
    optimizer = optim.make_optimizer(params, 2.5e-5)
    return optimizer, steps.init_state(params, optimizer)


@functools.cache
def compiled(devices, images_per_group=1, accumulate_steps=1, shard_params=False, model=MODEL):
    """The step on so many devices, how its state lies there, and their mesh."""
    optimizer, state = start(model)
    mesh = meshes.make_mesh(jax.devices()[:devices])
    layout = jax.tree.map(lambda _: meshes.replicated(mesh), state)
    layout = meshes.largest_axis(state, mesh) if shard_params else layout
    step = steps.make_train_step(model, optimizer, images_per_group, accumulate_steps)
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, layout), meshes.shard(make_batch(), mesh)
        step = jax.jit(step, out_shardings=(layout, meshes.replicated(mesh))).lower(*placed).compile()
    return step, layout, mesh


def walk(batch, *arguments, **options):
    """The parameters and losses after five steps of `compiled`."""
    (step, layout, mesh), losses = compiled(*arguments, **options), []
    with jax.set_mesh(mesh):
        state, batch = jax.device_put(start(MODEL)[1], layout), meshes.shard(batch, mesh)
        for _ in range(5):
            state, metrics = step(state, batch)
            losses.append(jax.device_get(metrics))
    return jax.device_get(state['params']), losses


def close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


@pytest.mark.parametrize(
    ('devices', 'images_per_group'), [pytest.param(1, 1, marks=pytest.mark.trials), (2, 2)]
)
def test_a_batch_in_four_parts_gives_the_update_of_the_whole(devices, images_per_group):
    whole, expected = walk(make_batch(), devices, images_per_group)
    parts, losses = walk(make_batch(), devices, images_per_group, accumulate_steps=4)
    close(parts, whole, 1e-6)
    for ours, theirs in zip(losses, expected, strict=True):
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, err_msg=name)


def test_parts_without_any_object_share_the_objects_of_the_others():
    batch = make_batch()
    batch['valid'] = batch['valid'] & (np.arange(B) == 0)[:, None]  # three objects in all
    close(walk(batch, 2, 2, accumulate_steps=4)[0], walk(batch, 2, 2)[0], 1e-6)


def test_sharded_state_trains_as_replicated_state_does():
    whole, expected = walk(make_batch(), 8)
    parts, losses = walk(make_batch(), 8, shard_params=True)
    close(parts, whole, 1e-6)
    np.testing.assert_allclose([x['loss'] for x in losses], [x['loss'] for x in expected], rtol=1e-5)


def test_sharded_state_takes_an_eighth_of_the_memory_on_eight_devices():
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(start(MODEL)[1]))
    used = lambda program: program.memory_analysis().argument_size_in_bytes
    whole, parts = used(compiled(8)[0]), used(compiled(8, shard_params=True)[0])
    saved = (whole - parts) / state_bytes
    assert 0.8 < saved < 7 / 8  # biases and the like stay whole


def test_a_step_sends_its_gradient_once_and_little_else():
    """The sum of gradients and a few scalars, with position tables of the published size.

    The gradient of [CLS] and [DET] tokens is that of their positions, and sent for both.
    """
    model = MODEL.clone(pos_grid=(32, 54), mid_pos_grid=(32, 54))
    sent = collectives(compiled(8, model=model)[0].as_text())
    params = start(model)[1]['params']
    size = 4 * sum(x.size for x in jax.tree.leaves(params))
    size -= 4 * sum(params['backbone'][name].size for name in ('cls_token', 'det_token'))
    assert set(sent) == {'all-reduce'}
    assert size <= sent['all-reduce'][1] <= 1.05 * size


def test_a_sharded_step_gathers_its_parameters_once_and_no_activations():
    sent = collectives(compiled(8, shard_params=True)[0].as_text())
    size = 4 * sum(x.size for x in jax.tree.leaves(start(MODEL)[1]['params']))
    assert set(sent) == {'all-gather', 'all-reduce'}
    assert all(0.99 * size <= size_of_kind <= 1.05 * size for _, size_of_kind in sent.values())


def test_arrays_are_spread_over_their_largest_axis_that_divides():
    mesh = meshes.make_mesh()
    tree = {'a': jnp.zeros((3, 16, 32)), 'b': jnp.zeros((16, 30)), 'c': jnp.zeros(7), 'd': jnp.zeros(())}
    specs = {name: s.spec for name, s in meshes.largest_axis(tree, mesh).items()}
    assert [tuple(specs[name]) for name in 'abcd'] == [(None, None, 'batch'), ('batch', None), (None,), ()]


def test_only_arrays_of_four_axes_have_their_order_in_memory_fixed():
    tree = {'tables': jnp.zeros((2, 1, 3, 4)), 'rest': jnp.zeros((3, 16, 32))}
    shardings = jax.tree.map(lambda _: meshes.replicated(meshes.make_mesh()), tree)
    placed = meshes.in_memory(tree, shardings)
    assert placed == shardings | {'tables': Format(Layout((0, 1, 2, 3)), shardings['tables'])}


def test_rows_are_fetched_from_the_devices_unchanged():
    mesh = meshes.make_mesh()
    x = np.arange(48).reshape(16, 3)
    assert meshes.rows_of_process(16, mesh) == slice(0, 16)
    np.testing.assert_array_equal(meshes.fetch_rows(meshes.shard({'x': x}, mesh)['x']), x)


def test_numbers_and_arrays_of_the_mesh_are_replicated():
    mesh = meshes.make_mesh()
    tree = meshes.replicate({'a': np.arange(3.0, dtype=np.float32), 'b': 0.5}, mesh)
    again = meshes.replicate(tree, mesh)
    assert all(x.sharding == meshes.replicated(mesh) for x in jax.tree.leaves((tree, again)))
    assert again['a'].tolist() == [0, 1, 2] and float(again['b']) == 0.5


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(InputError, match='batch_size is 12.* 8 devices'):
        meshes.check_divides(12, meshes.make_mesh())


def test_loops_count_as_often_as_they_run():
    mesh = meshes.make_mesh()

    def ten_sums(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: jax.lax.psum(y, 'batch') * 0.1, x)

    mapped = jax.shard_map(
        ten_sums, mesh=mesh, in_specs=jax.P('batch'), out_specs=jax.P('batch'), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones((8, 25))).compile().as_text()
    assert collectives(text) == {'all-reduce': (10, 10 * 25 * 4)}


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('(f32[6], bf16[2]) all-reduce-start(a, b)', {'all-reduce': (1, 28)}),
        ('(f32[2,3], f32[16,3]) all-gather-start(a)', {'all-gather': (1, 192)}),
        ('((f32[8], f32[16]), (f32[1], f32[2])) reduce-scatter-start(a, b)', {'reduce-scatter': (1, 12)}),
        ('(f32[5], f32[5], u32[], u32[]) collective-permute-start(a)', {'collective-permute': (1, 20)}),
    ],
)
def test_of_an_asynchronous_collective_the_results_are_counted(line, expected):
    assert collectives(f'ENTRY %main (a: f32[6]) -> f32[6] {{\n  %x = {line}\n}}') == expected


def test_a_sharded_gradient_is_clipped_by_the_norm_of_all_of_it():
    mesh = meshes.make_mesh()
    grads = {'x': jnp.arange(16.0)}
    clip = optax.clip_by_global_norm(1.0)
    expected, _ = clip.update(grads, clip.init(grads))
    with jax.set_mesh(mesh):
        placed = jax.device_put(grads, meshes.largest_axis(grads, mesh))
        clipped, _ = jax.jit(clip.update)(placed, clip.init(placed))
    np.testing.assert_allclose(clipped['x'], expected['x'], rtol=1e-6)


def test_devices_of_a_slice_are_neighbours_and_so_are_those_of_a_process():
    make = lambda *numbers: types.SimpleNamespace(
        **dict(zip(('slice_index', 'process_index', 'id'), numbers, strict=True))
    )
    devices = [make(1, 0, 7), make(0, 2, 1), make(0, 1, 9), make(1, 0, 3)]
    ordered = sorted(devices, key=meshes.place_of)
    assert [device.id for device in ordered] == [9, 1, 3, 7]
    assert meshes.place_of(jax.devices()[0])[0] == 0  # a CPU is in no slice


def test_a_program_for_several_gpus_has_no_address_of_this_process_in_it(monkeypatch):
    """Divided by JAX, cuDNN's attention has one, and no later start would find the compiled program."""
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)  # needs a GPU
    mesh = meshes.make_mesh(jax.devices()[:4])
    rows = meshes.batch_sharding(mesh)
    q = jax.ShapeDtypeStruct((8, 2, 64, 16), jnp.bfloat16, sharding=rows)
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=rows)
    loss = lambda q, k, v, lengths: attention.fused(q, k, v, lengths).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q, lengths)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('__cudnn$fmha') >= 2 and 'CustomSPMDPartitioning' not in text
