"""DETR's set loss as the reference trains YOLOS with it (models/detector.py, SetCriterion).

Letters: B batch, Q queries ([DET] tokens), T targets, C classes, G groups of images.
"""

import jax
import jax.numpy as jnp

from yolos_jax import boxes, matcher, spmd

CLASS_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
EOS_COEF = 0.1  # weight of "no object" in the class loss: most queries have none


def set_loss(
    outputs: dict, targets: dict, images_per_group: int = 1, whole: dict | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of B images.

    The reference takes the class loss as a weighted mean on each GPU and averages over GPUs, so its
    value depends on how many images a GPU holds. `images_per_group` is that number: 1 for YOLOS-S,
    S (dWr) and B, 2 for YOLOS-Ti. The box losses are sums over the whole batch, divided by its objects or,
    where these are fewer, by its groups: the reference clamps the objects of each GPU to 1.

    Args:
        outputs: 'pred_logits' [B, Q, C + 1] and 'pred_boxes' [B, Q, 4] (cxcywh in 0..1).
        targets: 'labels' int32 [B, T] in 0..C-1, 'boxes' [B, T, 4] cxcywh in 0..1 with an area,
            'valid' bool [B, T]; values at padded targets are ignored. 'dropped' int32 [B], optional:
            how many objects of each image are not among the T.
        images_per_group: consecutive images whose class losses share one mean; divides B.
        whole: the targets of the whole batch, if these B are one of its equal parts; the mean of the
            parts' losses is then the loss of the whole batch.

    Returns:
        The weighted total and a dict of its unweighted parts 'loss_ce', 'loss_bbox' and 'loss_giou',
        with 'class_error' (% of matched queries whose best class is wrong, 100 when there is none),
        'cardinality_error' (mean difference of predicted and real object counts) and
        'dropped_targets' (int32, how many objects were dropped as their image has more than T or Q).
        With COCO's category ids as labels, C is the largest id plus 1. The total is NaN if a label is
        not in 0..C-1.

    Raises:
        ValueError: images_per_group does not divide B, or a device's rows of a part.
    """
    B, Q, classes = outputs['pred_logits'].shape
    valid = targets['valid']
    of_whole = valid if whole is None else whole['valid']
    _check_groups(B, images_per_group, len(of_whole))
    targets = _harmless(targets)
    query = matcher.match(outputs, targets)  # [B, T]
    num_boxes, num_matched = _objects_of_part(of_whole, len(of_whole) // B, Q, images_per_group)

    wanted = _class_of_query(query, targets['labels'], Q, classes - 1)  # [B, Q]
    logits = outputs['pred_logits'].astype(jnp.float32)
    loss_ce = jnp.mean(_class_losses(logits, wanted, images_per_group))
    loss_bbox, loss_giou = _box_losses(outputs['pred_boxes'], targets['boxes'], query)
    loss_bbox, loss_giou = (x.sum() / num_boxes for x in (loss_bbox, loss_giou))

    best = jnp.argmax(logits, axis=-1)
    wrong = (best != wanted) & (wanted < classes - 1)
    predicted = (best < classes - 1).sum(axis=1)
    metrics = {
        'loss_ce': loss_ce,
        'loss_bbox': loss_bbox,
        'loss_giou': loss_giou,
        'class_error': jnp.where(num_matched > 0, 100 * wrong.sum(dtype=jnp.float32) / num_matched, 100.0),
        'cardinality_error': jnp.abs(predicted - valid.sum(axis=1)).astype(jnp.float32).mean(),
        'dropped_targets': valid.sum() - (query >= 0).sum() + targets.get('dropped', jnp.int32(0)).sum(),
    }
    total = weighted(loss_ce, loss_bbox, loss_giou)
    # otherwise a label outside the head would silently train another class or "no object"
    outside = valid & ((targets['labels'] < 0) | (targets['labels'] >= classes - 1))
    return jnp.where(outside.any(), jnp.nan, total), metrics


def weighted(ce: jax.Array | float, bbox: jax.Array | float, giou: jax.Array | float) -> jax.Array | float:
    """The set loss from its parts."""
    return CLASS_WEIGHT * ce + BOX_WEIGHT * bbox + GIOU_WEIGHT * giou


def _objects_of_part(valid: jax.Array, parts: int, Q: int, images_per_group: int) -> tuple:
    """The divisors of one of `parts` equal parts of a batch: its share of the objects and of those matched.

    The reference divides by the objects of each GPU, at least 1; so there is at least one object per group.
    """
    objects = jnp.maximum(valid.sum(), len(valid) // images_per_group)
    return objects / parts, jnp.minimum(valid.sum(axis=1), Q).sum() / parts


def of_images(outputs: dict, targets: dict) -> dict[str, jax.Array]:
    """The components of `set_loss` for each image: arrays [B].

    'loss_ce', a weighted mean over the queries; 'loss_bbox' and 'loss_giou', sums over the objects; and
    'objects', how many there are.
    """
    targets, (_, Q, classes) = _harmless(targets), outputs['pred_logits'].shape
    query = matcher.match(outputs, targets)
    wanted = _class_of_query(query, targets['labels'], Q, classes - 1)
    loss_bbox, loss_giou = _box_losses(outputs['pred_boxes'], targets['boxes'], query)
    return {
        'loss_ce': _class_losses(outputs['pred_logits'].astype(jnp.float32), wanted, 1),
        'loss_bbox': loss_bbox.sum(axis=1),
        'loss_giou': loss_giou.sum(axis=1),
        'objects': targets['valid'].sum(axis=1),
    }


def _check_groups(rows: int, images_per_group: int, whole: int) -> None:
    """Raises ValueError if a group of images is not all in these rows, of a batch of `whole`."""
    if rows % images_per_group:
        raise ValueError(f'{rows} images do not divide into groups of {images_per_group}')
    if whole > rows and rows // spmd.num_devices() % images_per_group:  # a part has rows of each device
        raise ValueError(f"a device's rows of a part do not divide into groups of {images_per_group}")


def _harmless(targets: dict) -> dict:
    """Targets with a harmless object in place of padding, which may hold anything, even NaN."""
    valid = targets['valid']
    return targets | {
        'labels': jnp.where(valid, targets['labels'], 0),
        'boxes': jnp.where(valid[..., None], targets['boxes'], 0.5),
    }


def _class_of_query(query: jax.Array, labels: jax.Array, Q: int, no_object: int) -> jax.Array:
    """The class each query should predict, [B, Q]: that of its target, else "no object"."""

    def of_image(query: jax.Array, labels: jax.Array) -> jax.Array:
        index = jnp.where(query >= 0, query, Q)  # Q is out of bounds: dropped
        return jnp.full((Q,), no_object, labels.dtype).at[index].set(labels, mode='drop')

    return jax.vmap(of_image)(query, labels)


def _class_losses(logits: jax.Array, wanted: jax.Array, images_per_group: int) -> jax.Array:
    """Cross entropy, a weighted mean over each group of images, [G]."""
    no_object = logits.shape[-1] - 1
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
    weight = jnp.where(wanted == no_object, EOS_COEF, 1.0)  # [B, Q]
    grouped = lambda x: x.reshape(-1, images_per_group, x.shape[1])  # [G, B / G, Q]
    sums = grouped(-log_p * weight).sum(axis=(1, 2))
    return sums / grouped(weight).sum(axis=(1, 2))


def _box_losses(predicted: jax.Array, wanted: jax.Array, query: jax.Array) -> tuple:
    """L1 distance (cxcywh) and 1 - GIoU of the matched pairs, [B, T] each, 0 for other targets."""
    matched = query >= 0
    predicted = jnp.take_along_axis(predicted, jnp.maximum(query, 0)[..., None], axis=1)  # [B, T, 4]
    distance = jnp.abs(predicted - wanted).sum(-1)
    overlap = boxes.giou(boxes.cxcywh_to_xyxy(predicted), boxes.cxcywh_to_xyxy(wanted))
    return tuple(jnp.where(matched, x, 0) for x in (distance, 1 - overlap))
