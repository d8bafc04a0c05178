"""Reads pre-trained ViTs of other projects as the backbone a detector starts from.

It reads DeiT (distilled too) and timm, DINO, DINOv2, DINOv3, MoCo-v3 and MAE in torch's files; Hugging
Face's ViT, DeiT, ViTMAE, DINOv2 (with registers too) and DINOv3; and the npz files of Google's
vision_transformer (AugReg) and big_vision. Tensors get timm's names, which are the reference's, and
then become our parameters.
"""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from yolos_jax import posembed
from yolos_jax.errors import InputError
from yolos_jax.model import Vit, Yolos, init_params
from yolos_jax.patches import PATCH
from yolos_jax.weights import dino, foreign_config, google, hf_names, names, sizes, statistics
from yolos_jax.weights.tensor import Tensor
from yolos_jax.weights.tensors import CONFIG, TensorFile, summary

DINOV3_EPS = 1e-5  # of LayerNorm; other ViTs have 1e-6, or their config gives it
MOCO_HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}  # by width (MoCo-v3's vits.py); others have 6 for 384
FRESH = ('.det_token', '.mid_pos_embed')  # start fresh, as the heads do
# wrappers around the ViT, the outermost first
OF_HUGGING_FACE = 'vit.', 'deit.', 'dinov2.', 'dinov2_with_registers.'
PREFIXES = 'params/', '_orig_mod.', 'module.', 'model.', 'base_encoder.', 'backbone.', *OF_HUGGING_FACE
# what pre-training needed and a detector does not
IGNORED = re.compile(
    r'head[./]|head_dist\.|pre_logits[./]|pooler\.|classifier\.|cls_classifier\.|predictor\.'
    r'|distillation_classifier\.|decoder|mask_token|embeddings\.mask_token|momentum_encoder\.|MAPHead_0/|opt/'
)


class _Vit(NamedTuple):
    """A file's ViT under timm's names."""

    tensors: dict  # pos_embed is [1, 1 + n, D], n square; DINOv3 has none
    ignored: list[str]  # names of tensors that a detector has no use for
    report: list[str]  # what was changed on the way, a line each


def start(file: TensorFile, model: Yolos, rng: jax.Array) -> tuple[dict, list[str]]:
    """Parameters of a detector with the ViT in an open file, and a report, a line each.

    As `finetune_det` of the reference (models/backbone.py): patch positions are resampled to the model's
    grid (for DINOv2 with registers by DINOv2's method); [DET] positions and mid tables start as noise; in
    a distilled ViT the position of the distillation token becomes that of [CLS].

    Raises:
        InputError: the file is not a ViT, or has another shape.
    """
    vit = _read(file)
    for name, value in _fields(vit.tensors).items():
        if getattr(model, name) != value:
            raise InputError(f'a ViT of {name} {value}; the model asks for {getattr(model, name)}')
    heads = _heads(file, model.width)
    if heads not in (None, model.heads):
        raise InputError(f'a ViT of {heads} heads; the model asks for {model.heads}', 'model.heads')
    if ('pos_embed' in vit.tensors) != (model.pos_grid is not None):
        raise InputError(
            f'a ViT with{"out" * model.rope} a position table, but pos_grid is {model.pos_grid}',
            'model.pos_grid',
        )
    fresh = names.from_params(jax.device_get(init_params(model, rng)), model)
    tensors = {f'backbone.{name}': tensor for name, tensor in vit.tensors.items()}
    if (table := vit.tensors.get('pos_embed')) is not None:
        tensors['backbone.pos_embed'] = _positions(table, fresh['backbone.pos_embed'], model)
        side, (rows, columns) = math.isqrt(table.shape[1] - 1), model.pos_grid
        vit.report.append(f'resampled 1: pos_embed {side}x{side} -> {rows}x{columns}')
    kept = {k: v for k, v in fresh.items() if not k.startswith('backbone.') or k.endswith(FRESH)}
    params = names.to_params(tensors | kept, model)
    used = sorted(set(vit.tensors) - {'pos_embed'})
    of_table = ', and the [DET] rows of pos_embed' if table is not None else ''
    return params, [
        *vit.report,
        f'used {len(used)}: {summary(used)}',
        f'fresh {len(kept)}: {summary(kept)}{of_table}',
        f'ignored {len(vit.ignored)}: {summary(vit.ignored) or "nothing"}',
    ]


def features(file: TensorFile, heads: int | None) -> tuple[Vit, dict]:
    """The ViT in an open file with its own position table, and its parameters.

    heads: needed if neither the file nor its width tells how many there are.

    Raises:
        InputError: there is no ViT, or its heads are unknown.
    """
    vit, config = _read(file, keeps_class_row=True), foreign_config.read(file, CONFIG)
    fields, table = _fields(vit.tensors), vit.tensors.get('pos_embed')
    width = fields['width']
    if heads is None:
        heads = _heads(file, width) or sizes.HEADS.get(width)
    if heads is None:
        raise InputError(f'it does not say how many heads its {width} channels have; give heads', 'heads')
    side = None if table is None else math.isqrt(table.shape[1] - 1)
    eps = config.get('layer_norm_eps', DINOV3_EPS if fields['rope'] else Vit.eps)
    fields |= {'heads': heads, 'pos_grid': side and (side, side), 'eps': eps}
    sizes.check(Yolos(**fields))
    model = Vit(**fields)
    tensors = {f'backbone.{name}': tensor for name, tensor in vit.tensors.items()}
    return model, names.to_params(tensors, model)


def fields(file: TensorFile) -> dict:
    """The fields of a `Yolos` that the ViT in an open file determines: width, depth, registers and rope.

    Raises:
        InputError: there is no ViT.
    """
    return _fields(_read(file).tensors)


def _fields(tensors: dict) -> dict:
    registers = tensors.get('reg_token')
    return {
        'width': tensors['patch_embed.proj.bias'].shape[0],
        'depth': len({name.split('.')[1] for name in tensors if name.startswith('blocks.')}),
        'registers': 0 if registers is None else registers.shape[1],
        'rope': 'pos_embed' not in tensors,
    }


def _heads(file: TensorFile, width: int) -> int | None:
    """The number of heads of the ViT in a file, from the file or its project; None if unknown."""
    if any('base_encoder.' in name for name in file.tensors):
        return MOCO_HEADS.get(width)
    for name, tensor in file.tensors.items():
        if name.endswith('/query/kernel') and len(tensor.shape) > 2:  # Google's [..., D, H, d]
            return tensor.shape[-2]
    return foreign_config.heads(file)


def _positions(table: Tensor, fresh: Tensor, model: Yolos) -> Tensor:
    """The table [1, 1 + n, D] at the model's grid, with the [DET] rows of the fresh one."""
    old, side = table.numpy().astype(np.float32), math.isqrt(table.shape[1] - 1)
    square = old[0, 1:].reshape(side, side, -1)
    if model.registers:  # DINOv2's resampling: Keys' cubic with -0.5 and antialias
        patches = np.asarray(jax.image.resize(square, (*model.pos_grid, model.width), 'cubic'))
    else:
        patches = posembed.resample(square, model.pos_grid)
    det = fresh.numpy()[0, -model.num_det_tokens :]
    new = np.concatenate([old[0, :1], patches.reshape(-1, model.width), det])[None]
    return Tensor(new.shape, lambda: new)


def _unwrapped(tensors: dict) -> tuple[dict, list[str]]:
    """The tensors of the ViT without the prefixes of its wrappers, and the names of the ignored ones."""
    result, ignored = {}, []
    for name, tensor in tensors.items():
        short = name
        for prefix in PREFIXES:
            short = short.removeprefix(prefix)
        if IGNORED.match(short):
            ignored.append(name)
        else:
            names.add(result, short, tensor)
    return result, ignored


def _read(file: TensorFile, *, keeps_class_row: bool = False) -> _Vit:
    """The ViT in a file; keeps_class_row: as `keep` of `_with_class_row`."""
    (tensors, ignored), report, has_no_row = _unwrapped(file.tensors), [], False
    mean, std = statistics.of_file(file)
    if 'embedding/kernel' in tensors:
        tensors, mean, std, has_no_row = google.to_timm(tensors), google.MEAN, google.STD, True
        report += google.fill(tensors)
    elif any(name.startswith('embeddings.') for name in tensors):
        tensors = hf_names.to_timm(tensors)
    # DeiT III's class token has no position; in ViTs without layer scale k x k rows may be another grid
    has_no_row |= any('.ls1.' in name or name.endswith('.gamma_1') for name in tensors)
    tensors, unused, changes = dino.to_timm(tensors)
    ignored, report = [*ignored, *unused], [*report, *changes]
    is_distilled = tensors.pop('dist_token', None) is not None
    ignored += ['dist_token'] if is_distilled else []
    # fc_norm replaces norm, after pooling
    for name in [name for name in tensors if name.startswith('fc_norm.')]:
        names.add(tensors, name.removeprefix('fc_'), tensors.pop(name))
        report.append(f'{name} becomes {name.removeprefix("fc_")}')
    positions = [] if 'reg_token' in tensors else ['pos_embed']  # DINOv3 has registers, and no table
    for name in ('cls_token', *positions, 'patch_embed.proj.weight', 'patch_embed.proj.bias'):
        if name not in tensors:
            raise InputError(f'no ViT: {name} is missing (it has {summary(list(tensors)[:5])}, ...)')
    if (table := tensors.get('pos_embed')) is not None:
        table = _with_zero_row(table, report) if has_no_row else table
        _check_table(table, is_distilled=is_distilled)
        table = _with_class_row(table, report, keep=keeps_class_row) if is_distilled else table
        tensors['pos_embed'] = table
    if (registers := tensors.get('reg_token')) is not None and registers.shape[1] == 0:
        del tensors['reg_token']  # Hugging Face's, of none
    kernel = tensors['patch_embed.proj.weight']
    if (side := kernel.shape[-1]) < PATCH and kernel.shape[1:] == (3, side, side):
        tensors['patch_embed.proj.weight'] = dino.resample_patch(kernel, PATCH)
        report.append(f'resampled 1: patches of {side} pixels -> {PATCH}')
    report += statistics.fold(tensors, 'patch_embed.proj.', mean, std)
    foreign_config.check(file, has_table='pos_embed' in tensors)
    return _Vit(tensors, ignored, report)


def _check_table(table: Tensor, *, is_distilled: bool) -> None:
    """Raises InputError unless pos_embed is [1, k + n, D], n square, with a row for each of k tokens."""
    tokens = '[CLS] and the distillation token' if is_distilled else '[CLS]'
    if len(table.shape) != 3 or table.shape[0] != 1:
        raise InputError(f'no ViT: pos_embed is {list(table.shape)}')
    if not _is_square(table.shape[1] - 1 - is_distilled):
        raise InputError(f'its {table.shape[1]} positions are not a square grid and {tokens}')


def _with_class_row(table: Tensor, report: list[str], *, keep: bool) -> Tensor:
    """pos_embed of a distilled ViT, [1, 2 + n, D], with one row for its two tokens: [1, 1 + n, D].

    keep: take the class token's own row, and not the distillation token's, which the reference's
    `finetune_det` takes.
    """
    shape = 1, table.shape[1] - 1, table.shape[2]
    if keep:
        return table.then(lambda x: np.delete(x, 1, axis=1), shape)
    report.append('distilled: the distillation position becomes that of [CLS]')
    return table.then(lambda x: x[:, 1:], shape)


def _with_zero_row(table: Tensor, report: list[str]) -> Tensor:
    """pos_embed with a row of zeros for the class token, if it has only a square grid."""
    if len(table.shape) != 3 or not _is_square(table.shape[1]):
        return table
    _, rows, D = table.shape
    report.append('its class token has no position: zero')
    return table.then(lambda x: np.pad(x, [(0, 0), (1, 0), (0, 0)]), (1, rows + 1, D))


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
