"""The reference's optimiser: AdamW, clipping and a cosine per epoch (main.py and util/scheduler.py)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

UNDECAYED = {'bias', 'scale', 'pos_embed', 'cls_token', 'reg_token', 'det_token'}
LAST_RATE = 1e-7  # the reference's --min-lr
WARMUP_START, COSINE_END = 1e-6, 1e-5  # DeiT's --warmup-lr and --min-lr


def learning_rate(base: float, epochs: int, steps_per_epoch: int) -> Callable[[int], jax.Array]:
    """The rate of each step, as a function of the step.

    A cosine from `base` to 1e-7 that changes once per epoch, without warm-up. The reference steps its
    schedule at the end of an epoch with that epoch's number, so epochs 0 and 1 both run at `base`, and
    of n epochs the last has the cosine's rate at epoch n - 2: just above 1e-7 if they are many, half of
    `base` if they are 4.
    """
    return warmup_cosine(base, epochs, 0, steps_per_epoch, final=LAST_RATE)


def warmup_cosine(
    base: float, epochs: int, warmup_epochs: int, steps_per_epoch: int, final: float = COSINE_END
) -> Callable:
    """The rate of each step of a pre-training, as a function of the step (timm's CosineLRScheduler).

    The rate grows linearly from 1e-6 to `base`, then follows a cosine to `final` that counts the warm-up
    epochs too. As in the reference, epoch n has the rate of epoch n - 1.
    """
    epoch = np.maximum(np.arange(epochs) - 1, 0)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * epoch / epochs))
    warm = WARMUP_START + (base - WARMUP_START) * epoch / max(warmup_epochs, 1)
    # made in float64: near its end a cosine has few digits in float32
    table = np.where(epoch < warmup_epochs, warm, cosine).astype(np.float32)
    return lambda step: jnp.asarray(table)[jnp.minimum(step // steps_per_epoch, len(table) - 1)]


def decay_mask(params: dict) -> dict:
    """Which parameters weight decay acts on: a tree of bool shaped like `params`.

    The heads decay whole. In the backbone, biases, norms, pos_embed and tokens do not; mid_pos_embed does,
    since the reference's no_weight_decay() leaves it out.
    """
    decays = lambda path, _: path[0].key != 'backbone' or path[-1].key not in UNDECAYED
    return jax.tree.map_with_path(decays, params)


def make_deit_optimizer(
    params: dict, learning_rate: Callable, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW of pre-training, without clipping.

    Biases, norms, positions and tokens do not decay (timm's add_weight_decay and no_weight_decay()).
    """
    mask = jax.tree.map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)
    return optax.adamw(learning_rate, weight_decay=weight_decay, mask=mask)


def trainable(params: dict, frozen_blocks: int) -> dict:
    """A mask of what is trained (1) and frozen (0): a tree that broadcasts against `params`.

    frozen_blocks: how many of the backbone's first blocks are frozen, with the patch projection, the [CLS]
        token and the positions; if all blocks are, the last norm and the [DET] tokens are too.
        Raises ValueError if the backbone has fewer blocks.
    """
    depth = len(jax.tree.leaves(params['backbone']['blocks'])[0])
    if not 0 <= frozen_blocks <= depth:
        raise ValueError(f'frozen_blocks is {frozen_blocks}; the backbone has {depth} blocks')
    whole = frozen_blocks == depth

    def is_trained(path: tuple, x: jax.Array) -> np.ndarray | np.float32:
        top, name, *_ = [key.key for key in path] + ['']
        if top != 'backbone':
            return np.float32(1)
        if name in ('blocks', 'mid_pos_embed'):
            # [blocks or blocks - 1, ...]: the table after a block goes with it
            return np.float32(np.arange(len(x)) >= frozen_blocks).reshape(-1, *[1] * (x.ndim - 1))
        return np.float32(not whole and (name in ('norm', 'det_token') or not frozen_blocks))

    return jax.tree.map_with_path(is_trained, params)


def with_frozen(loss: Callable, mask: dict) -> Callable:
    """`loss` with zero gradients for frozen parameters; mask: of `trainable`."""
    kept = lambda x, share: share * x + (1 - share) * jax.lax.stop_gradient(x)
    return lambda params, *rest: loss(jax.tree.map(kept, params, mask), *rest)


def make_optimizer(
    params: dict,
    learning_rate: float | Callable,
    weight_decay: float = 1e-4,
    clip_norm: float = 0.1,
    frozen_blocks: int = 0,
    fresh_factor: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to a global norm; `learning_rate` is a number or a function of the step.

    frozen_blocks: as for `trainable`; gradients of frozen parameters do not count in the clipped norm.
    fresh_factor: factor on the learning rate of the heads and the [DET] tokens, which are not
        pre-trained.
    """
    multiplied_by = lambda factors: optax.stateless(
        lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)
    )
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decay_mask(params))
    parts = [optax.clip_by_global_norm(clip_norm), adamw]
    if fresh_factor != 1:
        is_fresh = lambda path: path[0].key != 'backbone' or path[-1].key == 'det_token'
        factor = lambda path, _: fresh_factor if is_fresh(path) else 1.0
        parts.append(multiplied_by(jax.tree.map_with_path(factor, params)))
    if frozen_blocks:
        mask = multiplied_by(trainable(params, frozen_blocks))
        parts = [mask, *parts, mask]
    return optax.chain(*parts)
