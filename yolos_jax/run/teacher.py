"""The teacher of a distilled pre-training: a classifier, or the saved logits of one."""

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
from yolos_jax.weights import deit, npz, tensors, zoo


class SavedClassifier(NamedTuple):
    """A classifier in a file."""

    model: Classifier
    params: dict
    sha256: str  # of the file
    classes: list[str] | None  # if the file has them


class Teacher(NamedTuple):
    """What a student learns from beside true labels."""

    params: dict | None = None  # of a teacher that sees the student's images
    labels: np.ndarray | None = None  # of saved logits, int32 [images]
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
        if len(train_set.labels):  # reveals logits in another order
            agree = np.mean(labels == train_set.labels)
            notes = (f'{config.teacher}: says the class of {agree:.1%} of the images',)
        teach = classification.of_labels(model.num_classes, group)
        return Teacher(
            labels=labels, teach=teach, digest=hashlib.sha256(labels.tobytes()).hexdigest(), notes=notes
        )
    teacher = read_classifier(config.teacher, 'teacher')
    if difference := other_classes(teacher, train_set.classes):
        raise InputError(f'{config.teacher}: cannot teach this data: {difference}', 'teacher')
    params = resized(teacher.params, teacher.model.side, model.side)
    options = dict(size=model.size, dtype=model.dtype, attention_kernel=model.attention_kernel)
    teach = classification.of_model(teacher.model.clone(**options))
    return Teacher(params=params, teach=teach, digest=teacher.sha256)


def other_classes(saved: SavedClassifier, classes: list[str]) -> str:
    """How the classes of a classifier differ from those of the data, in words; empty if they do not."""
    count = saved.model.num_classes
    if count != len(classes):
        return f'it has {count} classes, not {len(classes)}'
    for theirs, ours in zip(saved.classes or classes, classes, strict=True):
        if theirs != ours:
            return f'it has other classes, such as {theirs}, not {ours}'
    return ''


def read_classifier(location: str, argument: str) -> SavedClassifier:
    """The classifier of a workdir or a .pth.

    argument: the one that names it, for errors. Raises InputError if there is none.
    """
    path = zoo.local(location)
    path = path / deit.FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f'{path}: no such file', argument)
    try:
        with contextlib.closing(tensors.read(path)) as file:
            model, params = deit.read(file)
            classes = file.about.get('classes')
            known = isinstance(classes, list) and len(classes) == model.num_classes
            return SavedClassifier(model, params, file.sha256, classes if known else None)
    except InputError as error:
        raise InputError(str(error), argument) from None


def read_logits(path: str, count: int, num_classes: int) -> np.ndarray:
    """A teacher's logits of all images, in the order of `labelled.read`: [count, num_classes]."""
    try:
        logits = np.load(path, mmap_mode='r')
    except npz.DAMAGED as error:
        raise InputError(f'{path}: not a file that numpy.save wrote ({error})', 'teacher') from None
    if not isinstance(logits, np.ndarray) or logits.shape != (count, num_classes):
        shape = list(getattr(logits, 'shape', ['several arrays']))
        raise InputError(
            f'{path}: is {shape}, not the logits of {count} images and {num_classes} classes', 'teacher'
        )
    if logits.dtype.kind not in 'fiu' or not np.isfinite(logits).all():
        raise InputError(f'{path}: has logits that are not finite numbers', 'teacher')
    return logits


def resized(params: dict, old: int, new: int) -> dict:
    """A classifier's parameters with its positions resampled from old x old to new x new patches."""
    table = posembed.with_grid(params['backbone']['pos_embed'], (old, old), (new, new))
    return params | {'backbone': params['backbone'] | {'pos_embed': table}}
