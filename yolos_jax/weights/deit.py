"""Reads and writes pre-trained classifiers as .pth files with the tensor names of DeiT and timm.

Detectors start from them, and the original's `finetune_det` and timm read them; 'heads' is stored beside.
"""

import contextlib
import math
import sys
from pathlib import Path

import numpy as np

from yolos_jax.classifier import Classifier
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH
from yolos_jax.weights import foreign_config, names, sizes, statistics, tensors, torchfile
from yolos_jax.weights.tensor import Tensor
from yolos_jax.weights.tensors import TensorFile

FILE = 'deit.pth'  # beside the checkpoints of a pre-training, once it was evaluated


def write(params: dict, model: Classifier, path: Path, about: dict | None = None) -> None:
    """Write a file, replacing an existing one.

    about: {name: a number, a text, or a list of them} to store beside the weights.
    """
    by_name = names.from_params(params, model)
    by_name = {_timm(name): tensor for name, tensor in by_name.items()}
    if model.distilled:
        by_name['pos_embed'] = _moved(by_name['pos_embed'], start=-1, to=1)
    torchfile.write(path, {'model': by_name, 'heads': model.heads} | (about or {}))


def about(path: Path) -> dict:
    """What is stored beside the weights in a file; empty if it cannot be read."""
    try:
        with contextlib.closing(tensors.read(path)) as file:
            return file.about
    except (OSError, InputError):
        return {}


def read(file: TensorFile) -> tuple[Classifier, dict]:
    """The classifier in an open file, of DeiT, timm or this project.

    Pixel statistics in a timm folder are folded into the patch projection, as for all weights here.

    Raises:
        InputError: it is not a classifier, or not of this kind.
    """
    by_name = dict(file.tensors)
    for name in ('pos_embed', 'patch_embed.proj.bias', 'head.weight'):
        if name not in by_name:
            raise InputError(f'{file.path}: no classifier: {name} is missing')
    for line in statistics.fold(by_name, 'patch_embed.proj.', *statistics.of_file(file)):
        print(f'{file.path}: {line}', file=sys.stderr)
    distilled = 'dist_token' in by_name
    if distilled:
        by_name['pos_embed'] = _moved(by_name['pos_embed'], start=1, to=-1)
    (width,), (num_classes, _) = by_name['patch_embed.proj.bias'].shape, by_name['head.weight'].shape
    foreign_config.check(file, has_table=True)
    heads = foreign_config.heads(file) or sizes.HEADS.get(width, width / 64)
    if heads != heads // 1 or heads < 1 or width % heads:
        raise InputError(f'{file.path}: does not say how many heads a width of {width} has')
    model = Classifier(
        width=width,
        depth=len({name.split('.')[1] for name in by_name if name.startswith('blocks.')}),
        heads=int(heads),
        num_classes=num_classes,
        size=PATCH * math.isqrt(by_name['pos_embed'].shape[1] - 1 - distilled),
        distilled=distilled,
    )
    ours = {_ours(name): tensor for name, tensor in by_name.items()}
    return model, names.to_params(ours, model)


def _timm(name: str) -> str:
    return name.removeprefix('backbone.').replace('det_token', 'dist_token')


def _ours(name: str) -> str:
    return name if name.startswith('head') else f'backbone.{name.replace("dist_token", "det_token")}'


def _moved(table: Tensor, start: int, to: int) -> Tensor:
    """A table [1, rows, D] with the distillation token's row moved: in our parameters it is the last."""
    place = to % table.shape[1]
    return table.then(lambda x: np.insert(np.delete(x, start, axis=1), place, x[:, start], axis=1))
