"""The reference's optimiser: AdamW, clipping and a cosine per epoch (main.py and util/scheduler.py)."""

import jax
import jax.numpy as jnp
import optax

LAST_RATE = 1e-7  # the reference's --min-lr


def learning_rate(base, epochs, steps_per_epoch):
    """The rate of each step, as a function of the step.

    A cosine from `base` to 1e-7 that changes once per epoch, without warm-up. The reference steps its
    schedule at the end of an epoch with that epoch's number, so epochs 0 and 1 both run at `base` and
    the last one ends just above 1e-7.
    """

    def rate(step):
        epoch = jnp.maximum(step // steps_per_epoch - 1, 0)
        # in two products: base - (base - last) * 0 must be base exactly
        fall = 0.5 * (1 - jnp.cos(jnp.pi * epoch / epochs))
        return base - (base - LAST_RATE) * fall

    return rate


def decay_mask(params):
    """Which parameters weight decay acts on: a tree of bool shaped like `params`.

    The heads decay whole. In the backbone, biases, norms, pos_embed, cls_token and det_token do not;
    mid_pos_embed does, since the reference's no_weight_decay() leaves it out.
    """
    spared = {'bias', 'scale', 'pos_embed', 'cls_token', 'det_token'}

    def decays(path, _):
        names = [key.key for key in path]
        return names[0] != 'backbone' or names[-1] not in spared

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(params, learning_rate, weight_decay=1e-4, clip_norm=0.1):
    """AdamW on gradients clipped to a global norm; `learning_rate` is a number or a step's function."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decay_mask(params)),
    )
