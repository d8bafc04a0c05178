import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import TINY, forward, make_hf, make_targets, noise, reference_tensors, to_torch

from yolos_jax import boxes, optim, steps
from yolos_jax.model import Yolos, init_params
from yolos_jax.patches import patchify
from yolos_jax.run import mesh as meshes
from yolos_jax.weights import names

C = 5


def make_batch(counts, seed=0):
    """A batch of images of one size, ours and transformers'."""
    images = [noise(64, 96, seed + i) for i in range(len(counts))]
    ours, theirs = make_targets(counts, 6, C, seed)
    patches, grid = patchify(images)
    return {'patches': patches, 'grid': grid, **ours}, torch.cat(list(map(to_torch, images))), theirs


@pytest.fixture(scope='module')
def yolos():
    return Yolos(**TINY, num_classes=C, eps=1e-12)


@pytest.fixture(scope='module')
def params(yolos):
    return init_params(yolos, jax.random.key(0))


def square(params, part, whole):
    """A loss of all parameters that is traced at once: the update does not depend on what is minimised."""
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(params)) * part['scale'].mean(), {}


GOOD, BAD = {'scale': np.ones(2, np.float32)}, {'scale': np.full(2, np.inf, np.float32)}


def torch_optimizer(hf, rate):
    """The reference's parameter groups (main.py, build_optimizer), detections by transformers' names."""
    groups = {'decay': [], 'none': []}
    for name, value in hf.named_parameters():
        spared = ('cls_token', 'detection_tokens', 'embeddings.position_embeddings')
        in_backbone = name.startswith('vit.')
        free = value.ndim == 1 or name.endswith(spared)
        groups['none' if in_backbone and free else 'decay'].append(value)
    return torch.optim.AdamW(
        [{'params': groups['decay']}, {'params': groups['none'], 'weight_decay': 0.0}],
        lr=rate,
        weight_decay=1e-4,
    )


def test_eight_steps_are_those_of_pytorch(yolos):
    hf = make_hf(TINY, num_classes=C).train()
    params = names.to_params(reference_tensors(hf), yolos)
    batch, pixels, labels = make_batch((3, 0, 6, 1))
    rate = 1e-3  # large, so that a difference shows
    torch_opt = torch_optimizer(hf, rate)
    optimizer = optim.make_optimizer(params, rate)
    state = steps.init_state(params, optimizer)
    step = steps.make_train_step(yolos, optimizer, images_per_group=4)
    for _ in range(8):
        torch_opt.zero_grad()
        expected = hf(pixel_values=pixels, labels=labels).loss
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.1)
        torch_opt.step()
        state, metrics = step(state, batch)
        assert float(metrics['loss']) == pytest.approx(expected.item(), rel=1e-3)
        assert float(metrics['grad_norm']) == pytest.approx(norm.item(), rel=1e-3)
    assert int(state['step']) == 8


def test_eight_devices_do_what_one_does(yolos, params):
    batch, _, _ = make_batch((3, 0, 6, 1, 2, 0, 1, 5))
    optimizer = optim.make_optimizer(params, 1e-3)
    step = steps.make_train_step(yolos, optimizer, images_per_group=1)
    alone = steps.init_state(params, optimizer)
    mesh = meshes.make_mesh()
    spread = meshes.replicate(alone, mesh)
    for _ in range(4):
        alone, one = step(alone, batch)
        with jax.set_mesh(mesh):
            spread, eight = step(spread, meshes.shard(batch, mesh))
        assert float(eight['loss']) == pytest.approx(float(one['loss']), rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(yolos, params):
    optimizer = optim.make_optimizer(params, 1e-3)
    step = steps.make_train_step(yolos, optimizer, 1)
    batch, _, _ = make_batch((3, 1))
    state, _ = step(steps.init_state(params, optimizer), batch)
    bad = dict(batch, boxes=batch['boxes'] * np.float32(np.inf))
    after, metrics = step(state, bad)
    assert not metrics['finite'] and int(after['step']) == 2
    for name in ('params', 'opt_state'):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    _, metrics = step(after, batch)
    assert metrics['finite']


def test_a_loss_or_a_gradient_that_alone_is_not_finite_changes_nothing():
    """The loss of a label outside the classes is NaN, and its gradient is zero."""
    optimizer = optax.adamw(0.1)
    for loss in (lambda x: jnp.where(x > 0, jnp.nan, x), lambda x: jnp.sqrt(x - 1)):
        step = steps.make_update(lambda p, *_, loss=loss: (loss(p['x']), {}), optimizer)
        state, metrics = step(steps.init_state({'x': jnp.float32(1)}, optimizer), {})
        assert np.isfinite(metrics['loss']) != np.isfinite(metrics['grad_norm'])
        assert not metrics['finite'] and state['params']['x'] == 1


def test_parameters_that_are_not_finite_are_reported(params):
    optimizer = optim.make_optimizer(params, np.inf)
    _, metrics = steps.make_update(square, optimizer)(steps.init_state(params, optimizer), GOOD)
    assert np.isfinite(metrics['loss']) and not metrics['finite']


def test_a_schedule_counts_the_steps_that_were_not_finite(params):
    """Else every later epoch would begin late, and the log would show another rate than the one used."""
    rates = optim.learning_rate(1e-3, epochs=4, steps_per_epoch=1)
    optimizer = optim.make_optimizer(params, rates)
    step, state = steps.make_update(square, optimizer), steps.init_state(params, optimizer)
    for _ in range(3):
        state, metrics = step(state, BAD)
        assert not metrics['finite']
    last, _ = step(state, GOOD)
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), last['params'], params)
    largest = max(jax.tree.leaves(change))  # AdamW's first update is as large as the rate
    assert 0 < largest <= 1.01 * float(rates(3)) < 0.6 * float(rates(0))


def test_a_state_that_does_not_match_the_ema_setting_is_refused(yolos, params):
    optimizer = optim.make_optimizer(params, 1e-3)
    batch, _, _ = make_batch((3, 1))
    for ema in (0.0, 0.9):
        state = steps.init_state(params, optimizer, ema=not ema)
        with pytest.raises(ValueError, match='average'):
            steps.make_train_step(yolos, optimizer, ema=ema)(state, batch)
    with pytest.raises(ValueError, match='do not divide into 3 parts'):
        steps.make_train_step(yolos, optimizer, accumulate_steps=3)(
            steps.init_state(params, optimizer), batch
        )


def test_of_a_batch_in_parts_counts_are_summed_and_other_metrics_averaged():
    def loss(params, part, whole):
        return params['x'] * part['y'].mean(), {'count': (part['y'] > 1).sum(), 'mean': part['y'].mean()}

    optimizer = optax.sgd(0.1)
    step = steps.make_update(loss, optimizer, accumulate_steps=2)
    batch = {'y': np.float32([1, 2, 3, 6])}
    state, metrics = step(steps.init_state({'x': jnp.float32(1)}, optimizer), batch)
    assert (metrics['count'], metrics['mean'], metrics['loss']) == (3, 3, 3)
    assert jnp.issubdtype(metrics['count'].dtype, jnp.integer)
    assert state['params']['x'] == pytest.approx(1 - 0.1 * 3)


def test_a_custom_loss_replaces_the_set_loss(yolos, params):
    optimizer, (batch, _, _) = optim.make_optimizer(params, 1e-3), make_batch((3, 1))
    loss = lambda outputs, part, group, whole: (outputs['pred_boxes'].sum(), {'group': jnp.float32(group)})
    step = steps.make_train_step(yolos, optimizer, 2, loss=loss)
    metrics = jax.eval_shape(step, steps.init_state(params, optimizer), batch)[1]
    assert metrics.keys() == {'loss', 'group', 'grad_norm', 'weight_norm', 'finite'}


def test_predictions_are_the_best_real_class_of_every_query(yolos, params):
    batch, _, _ = make_batch((1, 1))
    detections = steps.make_predict_step(yolos)(params, batch)
    out = forward(yolos, params, batch['patches'], batch['grid'])
    probability = np.asarray(jax.nn.softmax(out['pred_logits']))[..., :C]
    np.testing.assert_array_equal(detections['labels'], probability.argmax(-1))
    np.testing.assert_allclose(detections['scores'], probability.max(-1), rtol=1e-6)
    expected = boxes.cxcywh_to_xyxy(jnp.asarray(out['pred_boxes']))
    np.testing.assert_allclose(detections['boxes'], expected, atol=1e-6)


def test_the_moving_average_forgets_faster_in_the_first_steps(params):
    optimizer = optim.make_optimizer(params, 1e-2)
    step = steps.make_update(square, optimizer, ema=0.5)
    state, expected = steps.init_state(params, optimizer, ema=True), params
    for t in range(4):
        state, _ = step(state, GOOD)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, state['params'])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state['ema'], expected
    )
    after, _ = step(state, BAD)
    jax.tree.map(np.testing.assert_array_equal, after['ema'], state['ema'])
