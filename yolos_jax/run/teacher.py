"""What a pre-training learns from beside true labels: a classifier, or the logits of one."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from yolos_jax import classification, posembed
from yolos_jax.classifier import Classifier
from yolos_jax.data import labelled
from yolos_jax.errors import InputError
from yolos_jax.weights import deit, tensors, zoo


class Teacher(NamedTuple):
    """What a student learns from beside true labels."""

    params: dict | None = None  # of one that sees the images
    labels: np.ndarray | None = None  # of one that has seen them, int32 [images]
    teach: Callable | None = None  # as `classification.make_loss` takes it
    digest: str = ''
    notes: tuple[str, ...] = ()


def make_teacher(
    config: ConfigDict, model: Classifier, train_set: labelled.LabelledImages, group: int
) -> Teacher:
    """The teacher of a config.

    Raises:
        InputError: it is neither a classifier of these classes nor logits of the images.
    """
    if not config.teacher:
        return Teacher()
    if str(config.teacher).endswith('.npy'):
        logits = read_logits(config.teacher, len(train_set), model.num_classes)
        labels, notes = logits.argmax(axis=1).astype(np.int32), ()
        if len(train_set.labels):  # logits in another order show here
            agree = np.mean(labels == train_set.labels)
            notes = (f'{config.teacher}: says the class of {agree:.1%} of the images',)
        teach = classification.of_labels(model.num_classes, group)
        return Teacher(
            labels=labels, teach=teach, digest=hashlib.sha256(labels.tobytes()).hexdigest(), notes=notes
        )
    teacher, params, sha256 = read_classifier(config.teacher, 'teacher')
    if teacher.num_classes != model.num_classes:
        raise InputError(
            f'{config.teacher}: a classifier of {teacher.num_classes} classes; these data have '
            f'{model.num_classes}',
            'teacher',
        )
    params = resized(params, teacher.side, model.side)
    options = dict(size=model.size, dtype=model.dtype, attention_kernel=model.attention_kernel)
    teacher = teacher.clone(**options)
    return Teacher(params=params, teach=classification.of_model(teacher), digest=sha256)


def read_classifier(location: str, argument: str) -> tuple[Classifier, dict, str]:
    """A classifier of a workdir or a .pth, its parameters, and the SHA-256 of its file.

    argument: which names it, for errors. Raises InputError where there is none.
    """
    path = zoo.local(location)
    path = path / deit.FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f'{path}: no such file', argument)
    with contextlib.closing(tensors.read(path)) as file:
        return *deit.read(file), file.sha256


def read_logits(path: str, count: int, num_classes: int) -> np.ndarray:
    """A teacher's logits of all images, in the order of `labelled.read`: [count, num_classes]."""
    try:
        logits = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f'{path}: not a file of numpy.save ({error})', 'teacher') from None
    if not isinstance(logits, np.ndarray) or logits.shape != (count, num_classes):
        shape = list(getattr(logits, 'shape', ['several arrays']))
        raise InputError(
            f'{path}: is {shape}, not the logits of {count} images and {num_classes} classes', 'teacher'
        )
    if not np.isfinite(logits).all():
        raise InputError(f'{path}: has logits that are not finite', 'teacher')
    return logits


def resized(params: dict, old: int, new: int) -> dict:
    """A classifier's parameters with its positions resampled from old x old to new x new patches."""
    table = params['backbone']['pos_embed']
    square = table[0, 1 : 1 + old**2].reshape(old, old, -1)
    patches = posembed.resample(square, (new, new)).reshape(new**2, -1)
    table = np.concatenate([table[0, :1], patches, table[0, 1 + old**2 :]])[None]
    return params | {'backbone': params['backbone'] | {'pos_embed': table}}
