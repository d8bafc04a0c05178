"""Converts the ViTs of DINOv2 and DINOv3 to timm's names, with their layer scale folded in.

Layer scale is a factor per channel on the output of a branch, so it is folded into the branch's last dense
layer, and trained as a part of it. Keys of DINOv3 have no bias.
"""

import re

import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.weights import names
from yolos_jax.weights.tensor import Tensor

RENAMED = {'register_tokens': 'reg_token', 'storage_tokens': 'reg_token'}  # DINOv2's, DINOv3's own files
GAMMA = re.compile(r'(blocks\.\d+\.)gamma_([12])$')  # of layer scale, as BEiT's code names it
SCALE = re.compile(r'(blocks\.\d+\.)(ls[12])\.gamma')
SCALED = {'ls1': 'attn.proj', 'ls2': 'mlp.fc2'}
UNUSED = re.compile(r'rope_embed\.|local_cls_norm\.|.*\.qkv\.bias_mask$')
GATED = re.compile(r'.*\.mlp\.(w12|w1|w3|gate_proj|fc1_g|weights_in)\.')  # SwiGLU


def to_timm(tensors: dict) -> tuple[dict, list[str], list[str]]:
    """The tensors of any ViT, with what is special to DINOv2 and DINOv3 converted to a plain ViT's.

    Returns:
        {name: tensor}, the names that are ignored, and what was changed, a line each.

    Raises:
        InputError: the MLPs are gated (DINOv2 g; DINOv3 S+, H+ and 7B), which this model's are not.
    """
    if gated := next(filter(GATED.match, tensors), None):
        raise InputError(f'its MLPs are gated (SwiGLU: {gated}), and those of this model are not')
    ignored = [name for name in tensors if UNUSED.match(name)]
    result = {}
    for name in (name for name in tensors if name not in ignored):
        names.add(result, GAMMA.sub(r'\1ls\2.gamma', RENAMED.get(name, name)), tensors[name])
    masked = {name.removesuffix('_mask') for name in ignored if name.endswith('bias_mask')}
    for name in masked:
        result[name] = _without_keys(result[name])
    report = [f'keys have no bias in {len(masked)} blocks'] if masked else []
    for name in [name for name in result if name.endswith('attn.qkv.weight')]:
        _complete_bias(result, name.removesuffix('qkv.weight'))
    scales = list(filter(None, map(SCALE.fullmatch, result)))
    for scale in scales:
        _fold(result, f'{scale[1]}{SCALED[scale[2]]}', result.pop(scale[0]))
    report += [f'layer scale: {len(scales)} go into attn.proj and mlp.fc2'] if scales else []
    return result, ignored, report


def _complete_bias(tensors: dict, layer: str) -> None:
    """Give `layer`qkv.weight a bias where it has none, or timm's q_bias and v_bias alone."""
    rows = tensors[f'{layer}qkv.weight'].shape[0]
    parts = [tensors.pop(f'{layer}{part}_bias', None) for part in 'qkv']
    if f'{layer}qkv.bias' in tensors and all(part is None for part in parts):
        return
    zero = np.zeros(rows // 3, np.float32)
    read = lambda: np.concatenate([zero if part is None else part.numpy() for part in parts])
    names.add(tensors, f'{layer}qkv.bias', Tensor((rows,), read))


def _without_keys(bias: Tensor) -> Tensor:
    """A bias of queries, keys and values with zeros for the keys."""

    def without(x: np.ndarray) -> np.ndarray:
        queries, keys, values = np.split(x, 3)
        return np.concatenate([queries, np.zeros_like(keys), values])

    return bias.then(without)


def _fold(tensors: dict, layer: str, scale: Tensor) -> None:
    """Multiply a layer's outputs by a factor per channel."""
    factor = lambda x: scale.numpy().astype(np.float32).reshape(-1, *[1] * (x.ndim - 1))
    for name in (f'{layer}.weight', f'{layer}.bias'):
        if name in tensors:  # missing tensors are reported later, all at once
            tensors[name] = tensors[name].then(lambda x: x.astype(np.float32) * factor(x))


def resample_patch(weight: Tensor, patch: int) -> Tensor:
    """A patch convolution [D, 3, p, p] resampled for larger patches of `patch` pixels.

    A bilinearly enlarged patch gives the same as the original patch did (FlexiViT, arXiv 2212.08013,
    equation 4, by the pseudo-inverse).
    """
    side = weight.shape[-1]
    centre = (np.arange(patch) + 0.5) * side / patch - 0.5
    first = np.floor(centre)
    enlarge = np.zeros((patch, side))
    for tap, share in ((first, 1 - (centre - first)), (first + 1, centre - first)):
        np.add.at(enlarge, (np.arange(patch), np.clip(tap, 0, side - 1).astype(int)), share)
    # [patch, p], for one axis: the inverse for both axes is the product of theirs
    inverse = np.linalg.pinv(enlarge).T
    resample = lambda x: np.einsum('yi,xj,dcij->dcyx', inverse, inverse, x, optimize=True)
    return weight.then(lambda x: resample(x).astype(np.float32), (*weight.shape[:2], patch, patch))
