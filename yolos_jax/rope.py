"""Rotary positions of patches, as DINOv3 has them (arXiv 2508.10104; its layers/rope_position_encoding.py).

The position of a patch is its centre, -1..1 along the rows and the columns of its image. Queries and keys
are rotated by angles proportional to it, d / 4 for each axis, all used twice; so attention depends on how
far apart patches are. Other tokens are not rotated.

Letters: B batch, N patches, S tokens, H heads, M rows, d head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

BASE = 100.0  # the wavelengths are 1 up to this, in halves of an image


def angles(grid: jax.Array, length: int, special: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines [B, special + N, d] by which tokens are turned, float32.

    grid: int32 [B, 2], rows and columns of the patches; length: N; special: tokens before the patches;
        width: d, a multiple of 4.
    """
    patch, columns = jnp.arange(length), grid[:, 1:]
    places = jnp.stack([patch // columns, patch % columns], axis=-1)  # [B, N, 2]
    centres = 2 * (places + 0.5) / grid[:, None] - 1
    frequencies = BASE ** -(np.arange(width // 4, dtype=np.float32) * np.float32(4 / width))  # [d / 4]
    angle = 2 * np.float32(np.pi) * centres[..., None] * frequencies
    angle = jnp.tile(angle.reshape(*angle.shape[:2], width // 2), 2)  # [B, N, d]
    angle = jnp.pad(angle, [(0, 0), (special, 0), (0, 0)])
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Queries or keys [B, H, M, d] turned by the angles [B, M, d] of their tokens."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cosines[:, None] + turned * sines[:, None]).astype(x.dtype)
