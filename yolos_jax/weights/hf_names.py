"""Hugging Face's names of the tensors of a YOLOS or a ViT, to and from the names of the original and timm.

In the original (hustvl/YOLOS) and timm, q, k and v are one tensor.
"""

import re
from typing import Any

import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.weights import names
from yolos_jax.weights.tensor import Tensor

NAMES = (  # (Hugging Face, reference): prefixes
    ('vit.embeddings.cls_token', 'backbone.cls_token'),
    ('vit.embeddings.detection_tokens', 'backbone.det_token'),
    ('vit.embeddings.position_embeddings', 'backbone.pos_embed'),
    ('vit.encoder.mid_position_embeddings', 'backbone.mid_pos_embed'),
    ('vit.embeddings.patch_embeddings.projection.', 'backbone.patch_embed.proj.'),
    ('vit.layernorm.', 'backbone.norm.'),
    ('class_labels_classifier.', 'class_embed.'),
    ('bbox_predictor.', 'bbox_embed.'),
)
VIT_NAMES = (  # (Hugging Face's ViT, DeiT, ViTMAE, DINOv2 and DINOv3, timm): prefixes
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.distillation_token', 'dist_token'),
    ('embeddings.position_embeddings', 'pos_embed'),
    ('embeddings.patch_embeddings.projection.', 'patch_embed.proj.'),
    ('embeddings.patch_embeddings.', 'patch_embed.proj.'),  # DINOv3
    ('embeddings.register_tokens', 'reg_token'),
    ('layernorm.', 'norm.'),
)
BLOCK_NAMES = (  # (Hugging Face, reference and timm): prefixes within a block
    ('layernorm_before.', 'norm1.'),
    ('attention.output.dense.', 'attn.proj.'),
    ('attention.o_proj.', 'attn.proj.'),  # ViTs of transformers 5
    ('layernorm_after.', 'norm2.'),
    ('intermediate.dense.', 'mlp.fc1.'),
    ('output.dense.', 'mlp.fc2.'),
    ('mlp.up_proj.', 'mlp.fc1.'),  # DINOv3, as below
    ('mlp.down_proj.', 'mlp.fc2.'),
    ('layer_scale1.lambda1', 'ls1.gamma'),
    ('layer_scale2.lambda1', 'ls2.gamma'),
)
QKV = ('query', 'key', 'value')
_WRAPPERS = re.compile(r'(_orig_mod\.|module\.|model\.)*')
_LAYER = re.compile(r'(?:vit\.)?(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)\.')
_QKV = re.compile(r'attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)')
_BLOCK = re.compile(r'backbone\.blocks\.(\d+)\.')


def unwrapped(tensors: dict) -> dict:
    """Tensors without the prefixes of torch.compile, DDP and Lightning, and AveragedModel's counter."""
    result = {}
    for name, tensor in tensors.items():
        if name != 'n_averaged':
            names.add(result, _WRAPPERS.sub('', name, count=1), tensor)
    return result


def has_names(tensors: dict) -> bool:
    """Whether tensors carry Hugging Face's names of a YOLOS."""
    return any(name.startswith('vit.') for name in tensors)


def to_reference(tensors: dict) -> dict:
    """Tensors {name: tensor} of a Hugging Face YOLOS under the reference's names."""
    # transformers 5 keeps the mid tables in a module of their own
    plain = {name.replace('encoder.interpolation.', 'encoder.'): t for name, t in tensors.items()}
    return _joined(plain, NAMES, 'backbone.blocks.')


def to_timm(tensors: dict) -> dict:
    """Tensors {name: tensor} of a Hugging Face ViT, DeiT or ViTMAE under timm's names."""
    return _joined(tensors, VIT_NAMES, 'blocks.')


def _joined(tensors: dict, table: tuple, blocks: str) -> dict:
    """Tensors renamed by `table`, those of layers under `blocks`, with q, k and v joined."""
    result, parts = {}, {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        if layer is None:
            result[rename(name, table)] = tensor
            continue
        inside, prefix = name[layer.end() :], f'{blocks}{layer[1]}.'
        if part := _QKV.fullmatch(inside):
            parts.setdefault(f'{prefix}attn.qkv.{part[2]}', {})[part[1]] = tensor
        else:
            result[prefix + rename(inside, BLOCK_NAMES)] = tensor
    return result | join_qkv(parts)


def join_qkv(parts: dict[str, dict]) -> dict:
    """{name: one tensor} from {name: {'q', 'k', 'v': tensor}}, along the first axis.

    Where all biases are of q and v alone they have zeros for k: DINOv3's keys have none.
    """
    biases = [three for name, three in parts.items() if name.endswith('.bias')]
    if all(set(three) == set('qv') for three in biases):
        for three in biases:
            shape = three['q'].shape
            three['k'] = Tensor(shape, lambda shape=shape: np.zeros(shape, np.float32))
    for name, three in parts.items():
        if set(three) != set('qkv'):
            raise InputError(f'{name}: has {", ".join(three)} and not all of q, k and v')
    return {name: _concatenated([three[part] for part in 'qkv']) for name, three in parts.items()}


def _concatenated(parts: list) -> Tensor:
    rows, *rest = parts[0].shape
    return Tensor((len(parts) * rows, *rest), lambda: np.concatenate([part.numpy() for part in parts]))


def from_reference(tensors: dict) -> dict:
    """The reference's tensors under the names of Hugging Face's files."""
    result = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        if block is None:
            result[rename(name, [pair[::-1] for pair in NAMES])] = tensor
            continue
        inside, prefix = name[block.end() :], f'vit.encoder.layer.{block[1]}.'
        if inside.startswith('attn.qkv.'):
            kind = inside.rsplit('.', 1)[1]
            for part, third in zip(QKV, _thirds(tensor), strict=True):
                result[f'{prefix}attention.attention.{part}.{kind}'] = third
        else:
            result[prefix + rename(inside, [pair[::-1] for pair in BLOCK_NAMES])] = tensor
    return result


def _thirds(tensor: Tensor) -> list[Tensor]:
    shape = tensor.shape[0] // 3, *tensor.shape[1:]
    part = lambda i: tensor.then(lambda x: np.split(x, 3)[i], shape)
    return [part(i) for i in range(3)]


def rename(name: str, table: Any) -> str:
    """Replace the prefix of a name by the first pair of `table` [(old, new)] that fits."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
