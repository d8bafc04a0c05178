"""Pre-trained ViTs of other projects, as the backbone a detector starts from.

Taken are: DeiT (distilled too) and timm, DINO, MoCo-v3 and MAE in torch's files; Hugging Face's ViT, DeiT
and ViTMAE; and the npz files of Google's vision_transformer (AugReg) and big_vision. All are brought to
timm's names, which are the reference's, and then into our parameters.
"""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from yolos_jax import posembed
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params
from yolos_jax.weights import google, hf, names, statistics
from yolos_jax.weights.tensors import Tensor, TensorFile, summary

FRESH = ('.det_token', '.mid_pos_embed')  # beside the heads
# wrappers around the ViT, the outermost first
PREFIXES = ('params/', 'module.', 'base_encoder.', 'backbone.', 'vit.', 'deit.')
# what pre-training needed and a detector does not
IGNORED = re.compile(
    r'head[./]|head_dist\.|pre_logits[./]|pooler\.|classifier\.|cls_classifier\.|predictor\.'
    r'|distillation_classifier\.|decoder|mask_token|embeddings\.mask_token|momentum_encoder\.|MAPHead_0/|opt/'
)


class _Vit(NamedTuple):
    """A file's ViT under timm's names."""

    tensors: dict  # pos_embed is [1, 1 + n, D], n square
    ignored: list[str]  # names of tensors that a detector has no use for
    report: list[str]  # what was changed on the way, a line each


def start(file: TensorFile, model: Yolos, rng: jax.Array) -> tuple[dict, list[str]]:
    """Parameters of a detector with the ViT in an open file, and a report, a line each.

    As `finetune_det` of the reference (models/backbone.py): patch positions are resampled to the model's
    grid, those of the [DET] tokens and the mid tables start as noise; of a distilled ViT the position of
    the distillation token becomes that of [CLS].

    Raises:
        InputError: the file is no ViT, or one of another shape.
    """
    vit = _read(file)
    width, depth = _size(vit.tensors)
    if (width, depth) != (model.width, model.depth):
        raise InputError(
            f'a ViT of width {width} and depth {depth}; the model asks for {model.width} and {model.depth}'
        )
    fresh = names.from_params(jax.device_get(init_params(model, rng)), model)
    table = vit.tensors['pos_embed']
    tensors = {f'backbone.{name}': tensor for name, tensor in vit.tensors.items()}
    tensors['backbone.pos_embed'] = _positions(table, fresh['backbone.pos_embed'], model)
    kept = {k: v for k, v in fresh.items() if not k.startswith('backbone.') or k.endswith(FRESH)}
    params = names.to_params(tensors | kept, model)
    used = sorted(set(vit.tensors) - {'pos_embed'})
    side, (rows, columns) = math.isqrt(table.shape[1] - 1), model.pos_grid
    return params, [
        *vit.report,
        f'resampled 1: pos_embed {side}x{side} -> {rows}x{columns}',
        f'used {len(used)}: {summary(used)}',
        f'fresh {len(kept)}: {summary(kept)}, and the [DET] rows of pos_embed',
        f'ignored {len(vit.ignored)}: {summary(vit.ignored) or "nothing"}',
    ]


def size(file: TensorFile) -> tuple[int, int]:
    """Width and depth of the ViT in an open file; raises InputError where there is none."""
    return _size(_read(file).tensors)


def _size(tensors: dict) -> tuple[int, int]:
    depth = len({name.split('.')[1] for name in tensors if name.startswith('blocks.')})
    return tensors['patch_embed.proj.bias'].shape[0], depth


def _positions(table: Tensor, fresh: Tensor, model: Yolos) -> Tensor:
    """The table [1, 1 + n, D] at the model's grid, with the [DET] rows of the fresh one."""
    old, side = table.numpy().astype(np.float32), math.isqrt(table.shape[1] - 1)
    patches = posembed.resample(old[0, 1:].reshape(side, side, -1), model.pos_grid)
    det = fresh.numpy()[0, -model.num_det_tokens :]
    new = np.concatenate([old[0, :1], patches.reshape(-1, model.width), det])[None]
    return Tensor(new.shape, lambda: new)


def _unwrapped(tensors: dict) -> tuple[dict, list[str]]:
    """The tensors of the ViT without the prefixes of what is around it, and the names of the others."""
    result, ignored = {}, []
    for name, tensor in tensors.items():
        short = name
        for prefix in PREFIXES:
            short = short.removeprefix(prefix)
        if IGNORED.match(short):
            ignored.append(name)
        else:
            result[short] = tensor
    return result, ignored


def _read(file: TensorFile) -> _Vit:
    (tensors, ignored), report = _unwrapped(file.tensors), []
    mean, std = statistics.beside(file)
    if google.is_google(tensors):
        tensors, mean, std = google.to_timm(tensors), google.MEAN, google.STD
        report += google.fill(tensors)
    elif any(name.startswith('embeddings.') for name in tensors):
        tensors = hf.to_timm(tensors)
    if tensors.pop('dist_token', None):
        ignored.append('dist_token')
    for name in [
        name for name in tensors if name.startswith('fc_norm.')
    ]:  # after pooling, in place of norm
        tensors[name.removeprefix('fc_')] = tensors.pop(name)
        report.append(f'{name} becomes {name.removeprefix("fc_")}')
    for name in ('cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'):
        if name not in tensors:
            raise InputError(f'no ViT: {name} is missing (it has {summary(list(tensors)[:5])}, ...)')
    tensors['pos_embed'] = _with_class_row(tensors['pos_embed'], report)
    if statistics.differ(mean, std):
        report.append(statistics.report(mean, std))
        statistics.fold(tensors, 'patch_embed.proj.', mean, std)
    return _Vit(tensors, ignored, report)


def _with_class_row(table: Tensor, report: list[str]) -> Tensor:
    """pos_embed [1, 1 + n, D], n square: from n, 1 + n (class token) or 2 + n (distillation too) rows."""
    if len(table.shape) != 3 or table.shape[0] != 1:
        raise InputError(f'no ViT: pos_embed is {list(table.shape)}')
    _, rows, D = table.shape
    extra = next((k for k in (1, 2, 0) if math.isqrt(max(rows - k, 0)) ** 2 == rows - k > 0), None)
    if extra is None:
        raise InputError(f'its {rows} positions are no square grid')
    if extra == 2:
        report.append('distilled: the distillation position becomes that of [CLS]')
        return Tensor((1, rows - 1, D), lambda: table.numpy()[:, 1:])
    if extra == 0:
        report.append('its class token has no position: zero')
        zero = np.zeros((1, 1, D), np.float32)
        return Tensor((1, rows + 1, D), lambda: np.concatenate([zero, table.numpy()], axis=1))
    return table
