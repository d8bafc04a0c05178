"""Converts between the reference's state dict (hustvl/YOLOS) and our parameters.

The values are the same bits under other names and layouts. Every function is strict: missing
and unexpected tensors and other shapes raise an error that lists them all. Tensors are objects with
.shape and .numpy(), and are read when they are needed.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import classifier
from yolos_jax import model as detector
from yolos_jax.classifier import Classifier
from yolos_jax.errors import InputError, shown
from yolos_jax.model import Vit, Yolos
from yolos_jax.patches import PATCH
from yolos_jax.weights.tensor import Tensor


class _Parameter(NamedTuple):
    """One of our parameters and its names in the reference."""

    path: tuple[str, ...]  # keys in our tree
    kind: str  # how its layout differs from torch's: 'conv', 'kernel', or not at all
    names: list[str]  # the reference's, one for each block where the parameter is stacked
    shape: tuple  # of each in the reference
    stacked: tuple  # ours


def to_params(tensors: dict, model: Yolos | Vit | Classifier) -> dict:
    """The reference's tensors {name: tensor} as the parameters of `model`, float32.

    Raises:
        InputError: names or shapes differ from the model's, or values are not finite.
    """
    parameters = list(_parameters(model))
    _compare(tensors, {name: p.shape for p in parameters for name in p.names})
    params, bad = {}, []
    for path, kind, names, _, ours in parameters:
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        stacked = 'blocks' in path
        leaf = _aligned(ours)
        for i, name in enumerate(names):
            value = tensors[name].numpy()
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise InputError(f'{name} has values of type {value.dtype}: quantised weights are not read')
            with np.errstate(over='ignore'):  # of float64: inf, which is reported below
                value = value.astype(np.float32, copy=False)
            bad += [] if np.isfinite(value).all() else [name]
            leaf[i if stacked else ...] = _to_flax(value, kind)
        node[path[-1]] = leaf
    if bad:
        raise InputError(f'values that are not finite, in {", ".join(bad[:5])}')
    return params


def add(tensors: dict, name: str, tensor: Tensor) -> None:
    """Add a tensor that was renamed; raises InputError if there is one of that name."""
    if name in tensors:
        raise InputError(f'it holds {name} twice, under two names: two models in one?')
    tensors[name] = tensor


def _aligned(shape: tuple) -> np.ndarray:
    """An empty float32 array that JAX can use on the CPU without a copy: at a multiple of 64 bytes."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


def from_params(params: dict, model: Yolos | Vit | Classifier) -> dict[str, Tensor]:
    """The parameters of `model` as the reference's tensors {name: tensor}, float32."""
    tensors = {}
    for path, kind, names, shape, _ in _parameters(model):
        leaf = params
        for key in path:
            leaf = leaf[key]
        for i, name in enumerate(names):
            value = leaf[i] if 'blocks' in path else leaf
            tensors[name] = Tensor(shape, lambda value=value, kind=kind: _to_torch(np.asarray(value), kind))
    return tensors


def _parameters(model: Yolos | Vit | Classifier) -> Iterator[_Parameter]:
    shapes = (classifier if isinstance(model, Classifier) else detector).param_shapes(model)
    for keys, leaf in jax.tree.leaves_with_path(shapes):
        path, shape = tuple(key.key for key in keys), leaf.shape
        kind = 'conv' if path[-3:] == ('patch_embed', 'proj', 'kernel') else path[-1]
        last = {'kernel': 'weight', 'scale': 'weight'}.get(path[-1], path[-1])
        names = ['.'.join([*path[:-1], last]).replace('layers_', 'layers.')]
        if 'blocks' in path:
            names = [names[0].replace('.blocks.', f'.blocks.{i}.') for i in range(model.depth)]
            shape = shape[1:]
        of_reference = _to_torch(np.broadcast_to(np.float32(0), shape), kind).shape
        yield _Parameter(path, kind, names, of_reference, leaf.shape)


# Dense weights are transposed; the patch convolution [D, 3, 16, 16] is a matrix [768, D]


def _to_flax(value: np.ndarray, kind: str) -> np.ndarray:
    if kind == 'conv':
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if kind == 'kernel' else value


def _to_torch(value: np.ndarray, kind: str) -> np.ndarray:
    if kind == 'conv':
        return value.reshape(PATCH, PATCH, 3, -1).transpose(3, 2, 0, 1)
    return value.T if kind == 'kernel' else value


def _compare(tensors: dict, shapes: dict) -> None:
    missing = [f'{name} {list(shape)}' for name, shape in shapes.items() if name not in tensors]
    extra = [f'{name} {list(t.shape)}' for name, t in tensors.items() if name not in shapes]
    other = [
        f'{name} {list(tensors[name].shape)} instead of {list(shape)}'
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = {'missing': missing, 'not expected': extra, 'of another shape': other}
    texts = [f'{len(names)} {what}: {shown(names, 8)}' for what, names in problems.items() if names]
    if texts:
        raise InputError(f'these are not the tensors of the model: {"; ".join(texts)}')


def num_classes(tensors: dict) -> int:
    """C of the reference's tensors: the class head has a row more, for "no object"."""
    name = 'class_embed.layers.2.bias'
    if name not in tensors:
        raise InputError(f'no YOLOS detector: {name} is missing')
    return tensors[name].shape[0] - 1
