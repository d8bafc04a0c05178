"""Boxes: conversions and overlaps, as DETR's util/box_ops.py defines them.

cxcywh and xyxy are the two forms; both are [..., 4]. `iou` and `giou` broadcast the leading axes of their
arguments, so `giou(a[:, :, None], b[:, None])` is the pairwise table.
"""

import jax
import jax.numpy as jnp


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
    """Centre form [..., 4] to corner form [..., 4]."""
    cx, cy, w, h = jnp.moveaxis(boxes, -1, 0)
    return jnp.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], axis=-1)


def area(boxes: jax.Array) -> jax.Array:
    """Areas [...] of corner-form boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Intersection over union [...] of corner-form boxes, and their union [...]."""
    sides = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    intersection = jnp.prod(jnp.maximum(sides, 0), axis=-1)
    union = area(a) + area(b) - intersection
    return intersection / union, union


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Generalised IoU [...] of corner-form boxes (arXiv 1902.09630); at least one must have an area."""
    overlap, union = iou(a, b)
    sides = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    hull = jnp.prod(jnp.maximum(sides, 0), axis=-1)
    return overlap - (hull - union) / hull
