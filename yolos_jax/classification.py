"""The loss and the evaluation step of pre-training: pure functions, like those of `steps`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from yolos_jax import mixing
from yolos_jax.classifier import Classifier, stochastic_depth

STUDENT_SHARE = 0.5  # weight of the true labels' loss beside a teacher's (DeiT's --distillation-alpha)


def make_loss(
    model: Classifier, *, smoothing: float, drop_path: float, group: int, teach: Callable | None = None
) -> Callable:
    """The loss `loss(params, part, whole) -> (total, metrics)`, for `steps.make_update`.

    part: what `mixing.augmented` takes, 'labels' int32 [B] and 'share' float32 [B], an image's own share in
    the mixture. total: the cross-entropy with the mixed labels; with a teacher, the mean of that and of the
    distillation token's cross-entropy with the teacher's best class (hard distillation, DeiT section 3).

    Args:
        smoothing: of the labels. drop_path: rate of `stochastic_depth`. group: of `mixing`.
        teach: the teacher, from `of_model` or `of_labels`; None for no distillation.
    """

    def loss(params: dict, part: dict, whole: dict) -> tuple:
        images = mixing.augmented(part, group)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(part['noise'])
        branch_scale = stochastic_depth(keys, model.depth, drop_path) if drop_path else None
        logits = model.apply({'params': params}, images, branch_scale)
        options = dict(num_classes=model.num_classes, smoothing=smoothing, group=group)
        wanted = mixing.targets(part['labels'], part['share'], **options)
        total = loss_true = optax.softmax_cross_entropy(logits[:, 0], wanted).mean()
        metrics = {}
        if teach is not None:
            hard = teach(images, part, whole).argmax(axis=-1)
            loss_teacher = optax.softmax_cross_entropy_with_integer_labels(logits[:, 1], hard).mean()
            total = STUDENT_SHARE * loss_true + (1 - STUDENT_SHARE) * loss_teacher
            metrics = {'loss_true': loss_true, 'loss_teacher': loss_teacher}
        return total, metrics

    return loss


def of_model(teacher: Classifier) -> Callable:
    """A teacher that sees the student's images; its parameters are the 'fixed' ones of the state."""

    def teach(images: jax.Array, _: dict, whole: dict) -> jax.Array:
        return teacher.apply({'params': whole['fixed']}, images).mean(axis=1)

    return teach


def of_labels(num_classes: int, group: int) -> Callable:
    """A teacher whose labels of the unmixed images, int32 'teacher' [B], come with the batch."""

    def teach(_: jax.Array, part: dict, __: dict) -> jax.Array:
        options = dict(num_classes=num_classes, smoothing=0.0, group=group)
        return mixing.targets(part['teacher'], part['share'], **options)

    return teach


@functools.cache  # equal models share what is compiled
def make_evaluation_step(model: Classifier) -> Callable:
    """The step `step(params, batch) -> counts`, jitted, of a batch of 'patches' and 'labels'.

    counts: per image 'top1' and 'top5', whether its class is the likeliest or among the five likeliest, and
    'val_loss', the cross-entropy.
    """

    @jax.jit
    def step(params: dict, batch: dict) -> dict:
        logits, labels = model.apply({'params': params}, batch['patches']).mean(axis=1), batch['labels']
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        _, likeliest = jax.lax.top_k(logits, min(5, model.num_classes))
        right = (likeliest == labels[:, None]) & jnp.isfinite(loss)[:, None]
        return {'top1': right[:, 0], 'top5': right.any(axis=1), 'val_loss': loss}

    return step
