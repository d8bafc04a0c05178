"""Converts the npz files of Google's vision_transformer (AugReg) and big_vision to timm's names."""

import math

import numpy as np

from yolos_jax.weights import hf_names
from yolos_jax.weights.tensor import Tensor

MEAN = STD = np.full(3, 0.5, np.float32)  # pixels went in as -1..1
NAMES = {
    'LayerNorm_0': 'norm1',
    'LayerNorm_1': 'norm2',  # big_vision
    'LayerNorm_2': 'norm2',  # vision_transformer
    'Dense_0': 'mlp.fc1',
    'Dense_1': 'mlp.fc2',
    'out': 'attn.proj',
}


def to_timm(tensors: dict) -> dict:
    """Tensors under timm's names and layouts: these kernels are [in, out], blocks separate or stacked."""
    result, parts = {}, {}
    for name, tensor in tensors.items():
        *path, leaf = name.removeprefix('Transformer/').split('/')
        kind = 'bias' if leaf == 'bias' else 'weight'
        if path == ['embedding'] and leaf == 'kernel':
            H, W, channels, D = tensor.shape
            conv = lambda x: x.astype(np.float32).transpose(3, 2, 0, 1)
            result['patch_embed.proj.weight'] = tensor.then(conv, (D, channels, H, W))
        elif path == ['embedding']:
            result['patch_embed.proj.bias'] = tensor
        elif path == ['encoder_norm']:
            result[f'norm.{kind}'] = tensor
        elif leaf in ('pos_embedding', 'cls'):
            result[{'cls': 'cls_token', 'pos_embedding': 'pos_embed'}[leaf]] = tensor
        elif path and path[0].startswith('encoderblock'):
            stacked = path[0] == 'encoderblock'
            for i in range(tensor.shape[0]) if stacked else [int(path[0].rsplit('_', 1)[1])]:
                value = _of_block(tensor, i if stacked else ..., leaf, path[-1])
                if path[-1] in hf_names.QKV:
                    parts.setdefault(f'blocks.{i}.attn.qkv.{kind}', {})[path[-1][0]] = value
                else:
                    result[f'blocks.{i}.{NAMES.get(path[-1], name)}.{kind}'] = value
        else:
            result[name] = tensor
    return result | hf_names.join_qkv(parts)


def _of_block(tensor: Tensor, index: object, leaf: str, layer: str) -> Tensor:
    """One block's tensor as torch has it: heads flat, kernels [out, in]."""
    shape = tensor.shape if index is ... else tensor.shape[1:]
    flat = (math.prod(shape),)
    if leaf == 'kernel':
        flat = (math.prod(shape[:-1]), shape[-1]) if layer == 'out' else (shape[0], math.prod(shape[1:]))
    return tensor.then(lambda x: x[index].astype(np.float32).reshape(flat).T, flat[::-1])


def fill(tensors: dict) -> list[str]:
    """Add what big_vision's newer ViTs lack: a class token, and a table of positions (sincos2d).

    Returns what was added, a line each.
    """
    D, report = tensors['patch_embed.proj.bias'].shape[0], []
    if 'pos_embed' not in tensors:
        side = 14  # 224 pixels, what these were trained at
        y, x = np.mgrid[:side, :side].reshape(2, -1, 1)
        omega = 10_000 ** -(np.arange(D // 4) / (D // 4 - 1))
        waves = [f(place * omega) for place in (x, y) for f in (np.sin, np.cos)]
        table = np.concatenate(waves, axis=1)[None].astype(np.float32)
        tensors['pos_embed'] = Tensor(table.shape, lambda: table)
        report.append('the file has no positions: sincos2d of 14x14')
    if 'cls_token' not in tensors:
        fresh = np.random.default_rng(0).normal(0, 0.02, (1, 1, D)).astype(np.float32)
        tensors['cls_token'] = Tensor(fresh.shape, lambda: fresh)
        report.append('the file has no class token: fresh')
    return report
