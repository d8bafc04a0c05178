"""Between the reference's state dict, Hugging Face's, and our parameters.

Each is a dict of arrays under other names and layouts; the values are the same bits. Everything goes
through the reference's names (hustvl/YOLOS), and every function is strict: a tensor that is missing, not
expected or of another shape is an error that lists them all.
"""

import re

import jax
import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.model import PATCH

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
    """Hugging Face's tensors {name: array} under the reference's names, q, k and v joined."""
    result, parts = {}, {}
    for name, value in tensors.items():
        # transformers 5 keeps the mid tables in a module of their own
        plain = name.replace('encoder.interpolation.', 'encoder.')
        block = _LAYER.match(plain)
        if block is None:
            result[_rename(plain, HF_NAMES)] = value
            continue
        inside, prefix = plain[block.end() :], f'backbone.blocks.{block[1]}.'
        part = re.fullmatch(r'attention\.attention\.(query|key|value)\.(weight|bias)', inside)
        if part:
            parts.setdefault(f'{prefix}attn.qkv.{part[2]}', {})[part[1]] = value
        else:
            result[prefix + _rename(inside, HF_BLOCK_NAMES)] = value
    for name, three in parts.items():
        if set(three) != set(QKV):
            raise InputError(f'{name}: has {", ".join(three)} and not all of {", ".join(QKV)}')
        result[name] = np.concatenate([three[part] for part in QKV])
    return result


def to_hf(tensors):
    """The reference's tensors under the names of Hugging Face's files."""
    result = {}
    for name, value in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            result[_rename(name, [pair[::-1] for pair in HF_NAMES])] = value
            continue
        inside, prefix = name[block.end() :], f'vit.encoder.layer.{block[1]}.'
        if inside.startswith('attn.qkv.'):
            kind = inside.rsplit('.', 1)[1]
            for part, piece in zip(QKV, np.split(value, 3), strict=True):
                result[f'{prefix}attention.attention.{part}.{kind}'] = piece
        else:
            result[prefix + _rename(inside, [pair[::-1] for pair in HF_BLOCK_NAMES])] = value
    return result


def _rename(name, table):
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def to_params(tensors, model):
    """The reference's tensors {name: array} as the parameters of `model`, float32.

    Raises:
        InputError: names or shapes differ from the model's.
    """
    _compare(tensors, {name: shape for *_, names, shape in _table(model) for name in names})
    params = {}
    for path, kind, names, _ in _table(model):
        arrays = [_to_flax(np.asarray(tensors[name], np.float32), kind) for name in names]
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack(arrays) if 'blocks' in path else np.ascontiguousarray(arrays[0])
    return params


def from_params(params, model):
    """Our parameters as the reference's tensors {name: float32 array}."""
    tensors = {}
    for path, kind, names, _ in _table(model):
        value = params
        for key in path:
            value = value[key]
        value = np.asarray(value, np.float32)
        for name, one in zip(names, value if 'blocks' in path else [value], strict=True):
            tensors[name] = np.ascontiguousarray(_to_torch(one, kind))
    return tensors


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
