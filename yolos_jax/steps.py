"""The two jitted functions of this project: one training step and one prediction step."""

import functools

import jax
import jax.numpy as jnp
import optax

from yolos_jax import boxes, losses, sharding

LAYERS = 'blocks', 'mid_pos_embed'  # of the backbone, stacked


def make_train_step(model, optimizer, images_per_group, accumulate_steps=1):
    """The training step `step(state, batch) -> (state, metrics)`, jitted.

    state: {'params', 'opt_state', 'step'}. batch: 'patches' uint8 [B, N, 768], 'grid' int32 [B, 2],
    'labels' int32 [B, T], 'boxes' float32 [B, T, 4] (cxcywh in 0..1), 'valid' bool [B, T].
    metrics: 'loss', the parts of `losses.set_loss`, 'grad_norm' before clipping, and 'finite'.

    accumulate_steps: compute the batch in so many parts, one after the other, in about that fraction of
    the memory. Each device's rows must divide into parts of whole groups. The update is that of the
    batch at once: the class loss is a mean over equally many groups, and box losses are divided by the
    objects of all parts together. 'class_error' is the mean over parts.

    An update whose loss or gradient is not finite is not applied: params and opt_state stay as they
    were, `step` still counts, and 'finite' is False so that the caller can stop.
    """

    def loss_of(params, batch, num_boxes):
        layers = {name: x for name, x in params['backbone'].items() if name in LAYERS}
        params = sharding.gathered(params)
        params = params | {'backbone': params['backbone'] | layers}  # the model gathers layer by layer
        outputs = model.apply({'params': params}, batch['patches'], batch['grid'])
        return losses.set_loss(outputs, batch, images_per_group, num_boxes)

    gradient = jax.value_and_grad(loss_of, has_aux=True)

    def accumulated(params, batch):
        share = jnp.maximum(batch['valid'].sum(), 1) / accumulate_steps  # the parts' means are averaged
        parts = sharding.split_rows(batch, accumulate_steps)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, share)
        )
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(params, part, share)), None)
        (sums, _) = jax.lax.scan(add, zeros, parts)
        (loss, metrics), grads = jax.tree.map(lambda x: x / accumulate_steps, sums)
        metrics['dropped_targets'] *= accumulate_steps  # a count, not a mean
        return (loss, metrics), grads

    @jax.jit
    def step(state, batch):
        compute = accumulated if accumulate_steps > 1 else functools.partial(gradient, num_boxes=None)
        (loss, parts), grads = compute(state['params'], batch)
        updates, opt_state = optimizer.update(grads, state['opt_state'], state['params'])
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = {'params': optax.apply_updates(state['params'], updates), 'opt_state': opt_state}
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, {k: state[k] for k in new})
        metrics = {'loss': loss, **parts, 'grad_norm': grad_norm, 'finite': finite}
        return kept | {'step': state['step'] + 1}, metrics

    return step


def make_predict_step(model):
    """The prediction step `step(params, batch) -> detections`, jitted.

    batch: 'patches' and 'grid'. detections: 'scores' [B, Q], 'labels' [B, Q] and 'boxes' [B, Q, 4]
    (xyxy in 0..1 of the image): of every query the best class that is not "no object", as the
    reference's PostProcess; no suppression, no clipping.
    """

    @jax.jit
    def step(params, batch):
        outputs = model.apply({'params': params}, batch['patches'], batch['grid'])
        scores = jax.nn.softmax(outputs['pred_logits'], axis=-1)[..., :-1]
        return {
            'scores': scores.max(axis=-1),
            'labels': scores.argmax(axis=-1),
            'boxes': boxes.cxcywh_to_xyxy(outputs['pred_boxes']),
        }

    return step


def init_state(params, optimizer):
    """The state a run starts from."""
    return {'params': params, 'opt_state': optimizer.init(params), 'step': jnp.int32(0)}
