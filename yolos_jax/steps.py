"""The training step and the prediction step: pure functions of a state or parameters, and a batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from yolos_jax import boxes, losses, spmd
from yolos_jax.model import Yolos


def make_train_step(
    model: Yolos,
    optimizer: optax.GradientTransformation,
    images_per_group: int = 1,
    accumulate_steps: int = 1,
    loss: Callable = losses.set_loss,
    ema: float = 0.0,
) -> Callable:
    """The training step `step(state, batch) -> (state, metrics)`, jitted.

    state: {'params', 'opt_state', 'step'}, and 'ema' where that is not 0. batch: 'patches' uint8
    [B, N, 768], 'grid' int32 [B, 2], and what the loss reads: 'labels' int32 [B, T], 'boxes' float32
    [B, T, 4] (cxcywh in 0..1), 'valid' bool [B, T]. metrics: 'loss', what the loss reports, 'grad_norm'
    (not clipped), 'weight_norm' and 'finite'.

    If the loss or the gradient is not finite, the update is not applied: params and opt_state stay as they
    were, `step` and the learning rate schedule still advance, and 'finite' is False so that the caller can
    stop. 'finite' is also False if an applied update made the parameters non-finite, which takes an extreme
    learning rate; the caller must then go back to an earlier state.

    Args:
        images_per_group: for the loss.
        accumulate_steps: number of parts in which the batch is computed, one after the other, to save
            memory. Each device's rows must divide into parts of whole groups. The update equals that of
            the whole batch; metrics are means over the parts, counts (integers) are sums.
        loss: loss(outputs, part, images_per_group, whole) -> (total, metrics): `part` holds the rows of
            `outputs`, and the mean of the parts' totals is the loss of the `whole` batch.
        ema: decay of a moving average of the parameters, 0 for none. At step t it is at most
            (1 + t) / (10 + t), so that the first steps count less.

    The step raises ValueError if a batch does not divide into `accumulate_steps` and groups, or if the
    state has an 'ema' although `ema` is 0, or the reverse. On several devices, place the state and the
    batches with `run.mesh` (`make_mesh`, `replicate`, `shard`), and call the step within `jax.set_mesh`.
    """
    return make_update(make_loss(model, images_per_group, loss), optimizer, accumulate_steps, ema)


def make_loss(model: Yolos, images_per_group: int, loss: Callable = losses.set_loss) -> Callable:
    """The loss `loss_of(params, part, whole)` that `make_train_step` gives to `make_update`."""

    def loss_of(params: dict, part: dict, whole: dict) -> tuple:
        outputs = model.apply({'params': params}, part['patches'], part['grid'])
        return loss(outputs, part, images_per_group, whole)

    return loss_of


def make_update(
    loss_of: Callable, optimizer: optax.GradientTransformation, accumulate_steps: int = 1, ema: float = 0.0
) -> Callable:
    """As `make_train_step`, for any loss: loss_of(params, part, whole) -> (total, metrics).

    A state's optional 'fixed' is not trained; the loss receives it in `whole`, beside the batch.
    """
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    fixed = lambda state: {'fixed': state['fixed']} if 'fixed' in state else {}

    @jax.jit
    def step(state: dict, batch: dict) -> tuple[dict, dict]:
        if bool(ema) != ('ema' in state):
            raise ValueError(f'ema is {ema}, but the state has {"an" if "ema" in state else "no"} average')
        whole = batch | fixed(state)
        if accumulate_steps > 1:
            (total, parts), grads = _in_parts(gradient, state['params'], batch, whole, accumulate_steps)
        else:
            (total, parts), grads = gradient(state['params'], batch, whole)
        updates, opt_state = optimizer.update(grads, state['opt_state'], state['params'])
        grad_norm = optax.tree.norm(grads)
        new = {'params': optax.apply_updates(state['params'], updates), 'opt_state': opt_state}
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        counts_on = lambda x: isinstance(x, optax.ScaleByScheduleState)  # counts skipped steps too
        keep = lambda a, b: a if counts_on(a) else jnp.where(finite, a, b)
        kept = jax.tree.map(keep, new, {k: state[k] for k in new}, is_leaf=counts_on)
        # of what is kept: to know it before that is decided costs a TPU a sixth of a step (YOLOS-S)
        weight_norm = optax.tree.norm(kept['params'])
        if ema:
            decay = jnp.minimum(ema, (1 + state['step']) / (10 + state['step']))
            average = lambda old, x: jnp.where(finite, old + (1 - decay) * (x - old), old)
            kept['ema'] = jax.tree.map(average, state['ema'], new['params'])
        norms = {'grad_norm': grad_norm, 'weight_norm': weight_norm}
        metrics = {'loss': total, **parts, **norms, 'finite': finite & jnp.isfinite(weight_norm)}
        return kept | fixed(state) | {'step': state['step'] + 1}, metrics

    return step


def _in_parts(gradient: Callable, params: dict, batch: dict, whole: dict, count: int) -> tuple:
    """As `gradient(params, batch, whole)`, of `count` parts of the batch one after the other."""
    parts = spmd.split_rows(batch, count)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first, whole)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums: tuple, part: dict) -> tuple:
        return jax.tree.map(jnp.add, sums, gradient(params, part, whole)), None

    sums, _ = jax.lax.scan(add, zeros, parts)
    is_count = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda x: x if is_count(x) else x / count, sums)


@functools.cache  # equal models share what is compiled
def make_predict_step(model: Yolos) -> Callable:
    """The prediction step `step(params, batch) -> detections`, jitted.

    batch: 'patches' and 'grid'. detections: 'scores' [B, Q], 'labels' [B, Q] and 'boxes' [B, Q, 4]
    (xyxy in 0..1 of the image): the best class of each query other than "no object", as in the
    reference's PostProcess, without non-maximum suppression or clipping.
    """

    @jax.jit
    def step(params: dict, batch: dict) -> dict:
        return _detections(model.apply({'params': params}, batch['patches'], batch['grid']))

    return step


@functools.cache
def make_evaluation_step(model: Yolos) -> Callable:
    """As `make_predict_step`, for a batch with targets; the step also returns its `losses.of_images`."""

    @jax.jit
    def step(params: dict, batch: dict) -> dict:
        outputs = model.apply({'params': params}, batch['patches'], batch['grid'])
        return _detections(outputs) | losses.of_images(outputs, batch)

    return step


def _detections(outputs: dict) -> dict:
    scores = jax.nn.softmax(outputs['pred_logits'], axis=-1)[..., :-1]
    return {
        'scores': scores.max(axis=-1),
        'labels': scores.argmax(axis=-1),
        'boxes': boxes.cxcywh_to_xyxy(outputs['pred_boxes']),
    }


def init_state(
    params: dict, optimizer: optax.GradientTransformation, ema: bool = False, fixed: dict | None = None
) -> dict:
    """The state a run starts from; ema: with a moving average of the parameters; fixed: not trained."""
    state = {'params': params, 'opt_state': optimizer.init(params), 'step': jnp.int32(0)}
    state |= {} if fixed is None else {'fixed': fixed}
    return state | ({'ema': jax.tree.map(jnp.copy, params)} if ema else {})


def eval_params(state: dict) -> dict:
    """The parameters that are evaluated and exported: the moving average, if there is one."""
    return state.get('ema', state['params'])
