"""Random erasing, mixup and CutMix on the device, as timm's RandomErasing ('pixel') and Mixup ('batch').

They work on normalised pixels and so come after all 8-bit augmentation. Their random numbers are drawn with
the batch (`data.class_batches`).

Letters: B images, N patches, C classes.
"""

import jax
import jax.numpy as jnp

from yolos_jax import vit
from yolos_jax.patches import PATCH


def augmented(batch: dict, group: int) -> jax.Array:
    """The images of a batch, erased and mixed: float32 [B, N, 768].

    batch: 'patches' uint8 [B, N, 768] of square images; optional 'erase' int32 [B, 4], a
    rectangle (top, left, bottom, right; all zeros for none) for noise from the seeds 'noise' uint32 [B];
    'weight' float32 [B], an image's own weight in the mixture, and 'box' int32 [B, 4], where it has only
    its partner's pixels. group: consecutive images that are mixed in pairs, the first with the last.
    """
    pixels = vit.normalised(batch['patches'])
    if 'erase' in batch:
        draw = lambda seed: jax.random.normal(jax.random.key(seed), pixels.shape[1:], pixels.dtype)
        noise = jax.vmap(draw)(batch['noise'])
        pixels = jnp.where(_inside(batch['erase'], pixels.shape[1]), noise, pixels)
    weight = jnp.where(_inside(batch['box'], pixels.shape[1]), 0, batch['weight'][:, None, None])
    return weight * pixels + (1 - weight) * partners(pixels, group)


def targets(
    labels: jax.Array, share: jax.Array, *, num_classes: int, smoothing: float, group: int
) -> jax.Array:
    """The target distributions over classes [B, C] of mixed images.

    labels: int32 [B]. share: float32 [B], of an image itself. smoothing: the share spread over all classes.
    """
    own = jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    return share[:, None] * own + (1 - share[:, None]) * partners(own, group)


def partners(x: jax.Array, group: int) -> jax.Array:
    """The partner that each row is mixed with: rows [B, ...] in reverse order within each group."""
    groups = x.reshape(-1, group, *x.shape[1:])
    return groups[:, ::-1].reshape(x.shape)


def _inside(box: jax.Array, num_patches: int) -> jax.Array:
    """Which values of patches are in the boxes of their images: bool [B, N, 768] of int32 [B, 4]."""
    columns = round(num_patches**0.5)
    patch, pixel = jnp.arange(num_patches), jnp.arange(PATCH * PATCH)
    y = (patch // columns * PATCH)[:, None] + pixel // PATCH  # [N, 256]
    x = (patch % columns * PATCH)[:, None] + pixel % PATCH
    top, left, bottom, right = (box[:, i, None, None] for i in range(4))
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return jnp.repeat(inside, 3, axis=-1)
