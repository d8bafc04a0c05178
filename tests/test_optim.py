import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY

from yolos_jax import optim
from yolos_jax.model import Yolos, init_params

BLOCK = {
    'attn/qkv/kernel', 'attn/proj/kernel', 'mlp/fc1/kernel', 'mlp/fc2/kernel',
}  # fmt: skip
DECAYED = (
    {f'backbone/blocks/{name}' for name in BLOCK}
    | {'backbone/patch_embed/proj/kernel', 'backbone/mid_pos_embed'}
    | {f'{head}_embed/layers_{i}/{leaf}' for head in ('class', 'bbox') for i in range(3)
       for leaf in ('kernel', 'bias')}
)  # fmt: skip
SPARED = {
    'backbone/cls_token', 'backbone/det_token', 'backbone/pos_embed', 'backbone/norm/scale',
    'backbone/norm/bias', 'backbone/patch_embed/proj/bias', 'backbone/reg_token',
    *(f'backbone/blocks/{layer}/{leaf}' for layer in ('norm1', 'norm2') for leaf in ('scale', 'bias')),
    *(f'backbone/blocks/{name}'.replace('kernel', 'bias') for name in BLOCK),
}  # fmt: skip


@pytest.fixture(scope='module')
def params():
    return init_params(Yolos(**TINY, registers=2), jax.random.key(0))


def test_weight_decay_acts_on_these_parameters_and_no_other(params):
    mask = jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
    decays_by_name = {
        jax.tree_util.keystr(path, simple=True, separator='/'): decays for path, decays in mask
    }
    assert {name for name, decays in decays_by_name.items() if decays} == DECAYED
    assert {name for name, decays in decays_by_name.items() if not decays} == SPARED


def test_parameters_without_gradient_move_by_decay_alone(params):
    zero = jax.tree.map(np.zeros_like, params)
    for options, left in (({'weight_decay': 0.5}, 0.95), ({}, 1 - 1e-5)):
        optimizer = optim.make_optimizer(params, 0.1, **options)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        moved = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda p, d, x=left: p * (x if d else 1), params, optim.decay_mask(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)


def test_in_pre_training_only_kernels_decay_those_of_heads_too():
    names = 'kernel bias scale pos_embed cls_token det_token'.split()
    params = {'backbone': dict.fromkeys(names, jnp.ones(2)), 'head': dict.fromkeys(names[:2], jnp.ones(2))}
    optimizer = optim.make_deit_optimizer(params, lambda step: 0.1, 0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = optax.apply_updates(params, optimizer.update(zero, optimizer.init(params), params)[0])
    for part in moved.values():
        for name, value in part.items():
            np.testing.assert_allclose(value, 0.95 if name == 'kernel' else 1, rtol=1e-6)


def test_the_first_blocks_and_the_tables_after_them_are_frozen(params):
    backbone = optim.trainable(params, 1)['backbone']
    assert backbone['blocks']['norm1']['bias'].ravel().tolist() == [0, 1, 1]
    assert backbone['mid_pos_embed'].ravel().tolist() == [0, 1]
    frozen = [backbone[name] for name in ('cls_token', 'reg_token', 'pos_embed')]
    assert not any([*frozen, *backbone['patch_embed']['proj'].values()])
    heads = jax.tree.leaves([optim.trainable(params, 3)[f'{head}_embed'] for head in ('class', 'bbox')])
    assert all([*heads, backbone['det_token'], *backbone['norm'].values()])
    assert not any(x.any() for x in jax.tree.leaves(optim.trainable(params, 3)['backbone']))
    loss = optim.with_frozen(lambda blocks, factor: factor * blocks.sum(), np.float32([[0], [1], [1]]))
    assert jax.grad(loss)(jnp.ones((3, 2)), 5).tolist() == [[0, 0], [5, 5], [5, 5]]
    for blocks in (-1, 4):
        with pytest.raises(ValueError, match='the backbone has 3 blocks'):
            optim.trainable(params, blocks)


@pytest.mark.parametrize(('base', 'epochs', 'per_epoch'), [(2.5e-5, 150, 7), (5e-5, 300, 3), (1e-3, 1, 5)])
def test_the_rate_is_the_references_in_every_step(base, epochs, per_epoch):
    """util/scheduler.py: a cosine of the epoch, set at each epoch's end from that epoch's number."""
    rate = optim.learning_rate(base, epochs, per_epoch)
    current = base
    for epoch in range(epochs):
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            assert float(rate(step)) == pytest.approx(current, rel=2e-7)
        current = 1e-7 + 0.5 * (base - 1e-7) * (1 + math.cos(math.pi * epoch / epochs))


def test_a_warm_up_grows_linearly_to_the_rate_of_the_cosine_that_counts_it():
    """timm's CosineLRScheduler, set at each epoch's end: epoch n has the rate of n - 1."""
    rate, low, base = optim.warmup_cosine(1e-3, epochs=10, warmup_epochs=4, steps_per_epoch=2), 1e-6, 1e-3
    warm = [low, low, *(low + (base - low) * epoch / 4 for epoch in (1, 2, 3))]
    cosine = [1e-5 + 0.5 * (base - 1e-5) * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(4, 9)]
    expected = np.repeat([*warm, *cosine], 2)
    np.testing.assert_allclose([rate(step) for step in range(20)], expected, rtol=1e-6)


def test_frozen_parameters_do_not_move_and_their_gradients_are_not_clipped_with_the_others():
    ones = {'backbone': {'blocks': {'kernel': jnp.ones((2, 3))}}, 'class_embed': {'kernel': jnp.ones(4)}}
    optimizer = optim.make_optimizer(ones, 1.0, weight_decay=0.1, frozen_blocks=1)
    updates, state = optimizer.update(ones, optimizer.init(ones), ones)
    moved = updates['backbone']['blocks']['kernel'].any(axis=1)
    assert moved.tolist() == [False, True]
    first_moment = optax.tree.get(state, 'mu')
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.1 * (1 - 0.9), rel=1e-5)
    assert not first_moment['backbone']['blocks']['kernel'][0].any()


def test_gradients_are_clipped_to_a_global_norm(params):
    grads = jax.tree.map(np.ones_like, params)
    clip = optim.make_optimizer(params, 1.0)  # to 0.1, as the reference
    state = clip.init(params)
    _, state = clip.update(grads, state, params)
    first_moment = optax.tree.get(state, 'mu')
    assert float(optax.tree.norm(first_moment)) == pytest.approx(0.1 * (1 - 0.9), rel=1e-5)


def test_fresh_parameters_move_further_by_the_given_factor(params):
    gradients = jax.tree.map(jnp.ones_like, params)
    moves = []
    for factor in (1.0, 10.0):
        optimizer = optim.make_optimizer(params, 1e-3, fresh_factor=factor)
        moves.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    for (path, once), (_, more) in zip(*map(jax.tree_util.tree_leaves_with_path, moves), strict=True):
        names = [key.key for key in path]
        fresh = names[0] != 'backbone' or names[1] == 'det_token'
        np.testing.assert_allclose(more, once * (10 if fresh else 1), rtol=1e-6)
