"""Between the reference's state dict, Hugging Face's, and our parameters.

Each is a dict under other names and layouts; the values are the same bits. Everything goes through the
reference's names (hustvl/YOLOS), and every function is strict: a tensor that is missing, not expected or
of another shape is an error that lists them all. Tensors are objects with .shape and .numpy(), and are
read when they are needed.
"""

import math
import re

import jax
import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.model import PATCH
from yolos_jax.tensors import Tensor

HF_NAMES = (  # (Hugging Face, reference), prefixes of the names after the split of q, k and v
    ('vit.embeddings.cls_token', 'backbone.cls_token'),
    ('vit.embeddings.detection_tokens', 'backbone.det_token'),
    ('vit.embeddings.position_embeddings', 'backbone.pos_embed'),
    ('vit.encoder.mid_position_embeddings', 'backbone.mid_pos_embed'),
    ('vit.embeddings.patch_embeddings.projection.', 'backbone.patch_embed.proj.'),
    ('vit.layernorm.', 'backbone.norm.'),
    ('class_labels_classifier.', 'class_embed.'),
    ('bbox_predictor.', 'bbox_embed.'),
)
HF_BLOCK_NAMES = (
    ('layernorm_before.', 'norm1.'),
    ('attention.output.dense.', 'attn.proj.'),
    ('layernorm_after.', 'norm2.'),
    ('intermediate.dense.', 'mlp.fc1.'),
    ('output.dense.', 'mlp.fc2.'),
)
QKV = ('query', 'key', 'value')
_LAYER = re.compile(r'vit\.encoder\.layer\.(\d+)\.')
_BLOCK = re.compile(r'backbone\.blocks\.(\d+)\.')


def from_hf(tensors):
    """Hugging Face's tensors {name: tensor} under the reference's names, q, k and v joined."""
    result, parts = {}, {}
    for name, value in tensors.items():
        # transformers 5 keeps the mid tables in a module of their own
        plain = name.replace('encoder.interpolation.', 'encoder.')
        block = _LAYER.match(plain)
        if block is None:
            result[rename(plain, HF_NAMES)] = value
            continue
        inside, prefix = plain[block.end() :], f'backbone.blocks.{block[1]}.'
        part = re.fullmatch(r'attention\.attention\.(query|key|value)\.(weight|bias)', inside)
        if part:
            parts.setdefault(f'{prefix}attn.qkv.{part[2]}', {})[part[1]] = value
        else:
            result[prefix + rename(inside, HF_BLOCK_NAMES)] = value
    for name, three in parts.items():
        if set(three) != set(QKV):
            raise InputError(f'{name}: has {", ".join(three)} and not all of {", ".join(QKV)}')
        result[name] = join([three[part] for part in QKV])
    return result


def join(parts):
    """Tensors of one shape as one, along the first axis."""
    rows, *rest = parts[0].shape
    return Tensor((len(parts) * rows, *rest), lambda: np.concatenate([part.numpy() for part in parts]))


def _thirds(tensor):
    rows = tensor.shape[0] // 3
    part = lambda i: lambda: tensor.numpy()[i * rows : (i + 1) * rows]
    return [Tensor((rows, *tensor.shape[1:]), part(i)) for i in range(3)]


def to_hf(tensors):
    """The reference's tensors under the names of Hugging Face's files."""
    result = {}
    for name, value in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            result[rename(name, [pair[::-1] for pair in HF_NAMES])] = value
            continue
        inside, prefix = name[block.end() :], f'vit.encoder.layer.{block[1]}.'
        if inside.startswith('attn.qkv.'):
            kind = inside.rsplit('.', 1)[1]
            for part, piece in zip(QKV, _thirds(value), strict=True):
                result[f'{prefix}attention.attention.{part}.{kind}'] = piece
        else:
            result[prefix + rename(inside, [pair[::-1] for pair in HF_BLOCK_NAMES])] = value
    return result


def rename(name, table):
    """A name with the first prefix of `table` [(old, new)] that it has replaced."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def to_params(tensors, model):
    """The reference's tensors {name: tensor} as the parameters of `model`, float32.

    Raises:
        InputError: names or shapes differ from the model's, or values are not finite.
    """
    _compare(tensors, shapes(model))
    params, bad = {}, []
    for path, kind, names, shape in _table(model):
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        lead = (len(names),) if 'blocks' in path else ()
        leaf = _aligned(lead + _flax_shape(shape, kind))
        for i, name in enumerate(names):
            value = tensors[name].numpy().astype(np.float32, copy=False)
            bad += [] if np.isfinite(value).all() else [name]
            leaf[i if lead else ...] = _to_flax(value, kind)
        node[path[-1]] = leaf
    if bad:
        raise InputError(f'values that are not finite, in {", ".join(bad[:5])}')
    return params


def _aligned(shape):
    """An empty float32 array that JAX can use on the CPU without a copy: at a multiple of 64 bytes."""
    size = 4 * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)


def from_params(params, model):
    """Our parameters as the reference's tensors {name: tensor}, float32."""
    tensors = {}
    for path, kind, names, shape in _table(model):
        leaf = params
        for key in path:
            leaf = leaf[key]
        for i, name in enumerate(names):
            one = leaf[i] if 'blocks' in path else leaf
            tensors[name] = Tensor(shape, lambda one=one, kind=kind: _to_torch(np.asarray(one), kind))
    return tensors


def shapes(model):
    """The reference's state dict of a model: {name: shape}."""
    return {name: shape for *_, names, shape in _table(model) for name in names}


def _table(model):
    """(path, kind, the reference's names, their shape) of every parameter.

    path: a tuple of keys. A parameter stacked over blocks has a name for each block. kind: how its
    layout differs from torch's.
    """
    batch = (np.zeros((1, 1, 3 * PATCH**2), np.uint8), np.ones((1, 2), np.int32))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), *batch))['params']
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(key.key for key in keys)
        kind = 'conv' if path[-3:] == ('patch_embed', 'proj', 'kernel') else path[-1]
        last = {'kernel': 'weight', 'scale': 'weight'}.get(path[-1], path[-1])
        names = ['.'.join([*path[:-1], last]).replace('layers_', 'layers.')]
        if 'blocks' in path:
            names = [names[0].replace('.blocks.', f'.blocks.{i}.') for i in range(model.depth)]
            leaf = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        yield path, kind, names, jax.eval_shape(lambda x: _to_torch(x, kind), leaf).shape  # noqa: B023


def _to_flax(value, kind):
    """Dense weights are transposed; the patch convolution [D, 3, 16, 16] is a matrix [768, D]."""
    if kind == 'conv':
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T if kind == 'kernel' else value


def _flax_shape(shape, kind):
    if kind == 'conv':
        return (math.prod(shape[1:]), shape[0])
    return shape[::-1] if kind == 'kernel' else shape


def _to_torch(value, kind):
    if kind == 'conv':
        return value.reshape(PATCH, PATCH, 3, -1).transpose(3, 2, 0, 1)
    return value.T if kind == 'kernel' else value


def _compare(tensors, shapes):
    missing = [f'{name} {list(shape)}' for name, shape in shapes.items() if name not in tensors]
    extra = [f'{name} {list(t.shape)}' for name, t in tensors.items() if name not in shapes]
    other = [
        f'{name} {list(tensors[name].shape)} instead of {list(shape)}'
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = {'missing': missing, 'not expected': extra, 'of another shape': other}
    text = '; '.join(
        f'{len(names)} {what}: {", ".join(names[:8])}{", ..." if len(names) > 8 else ""}'
        for what, names in problems.items()
        if names
    )
    if text:
        raise InputError(f'these are not the tensors of the model: {text}')
