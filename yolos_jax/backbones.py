"""Pre-trained ViTs of other projects, as the backbone a detector starts from.

Taken are: DeiT (distilled too) and timm, DINO, MoCo-v3 and MAE in torch's files; Hugging Face's ViT, DeiT
and ViTMAE; and the npz files of Google's vision_transformer (AugReg) and big_vision. All are brought to
timm's names, which are the reference's, and then into our parameters.
"""

import json
import math
import re

import jax
import numpy as np

from yolos_jax import convert, posembed, tensors, weights
from yolos_jax.errors import InputError
from yolos_jax.model import MEAN, PATCH, STD
from yolos_jax.tensors import Tensor

FRESH = ('.det_token', '.mid_pos_embed')  # beside the heads
# wrappers around the ViT, the outermost first
PREFIXES = ('params/', 'module.', 'base_encoder.', 'backbone.', 'vit.', 'deit.')
# what pre-training needed and a detector does not
IGNORED = re.compile(
    r'head[./]|head_dist\.|pre_logits[./]|pooler\.|classifier\.|cls_classifier\.|predictor\.'
    r'|distillation_classifier\.|decoder|mask_token|embeddings\.mask_token|momentum_encoder\.|MAPHead_0/|opt/'
)
HF_NAMES = (
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.distillation_token', 'dist_token'),
    ('embeddings.position_embeddings', 'pos_embed'),
    ('embeddings.patch_embeddings.projection.', 'patch_embed.proj.'),
    ('layernorm.', 'norm.'),
)
HF_BLOCK_NAMES = (*convert.HF_BLOCK_NAMES, ('attention.o_proj.', 'attn.proj.'))
_HF_LAYER = re.compile(r'(?:encoder\.layer|layers)\.(\d+)\.')
_HF_QKV = re.compile(r'attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)')
_GOOGLE_NAMES = {
    'LayerNorm_0': 'norm1',
    'LayerNorm_1': 'norm2',  # big_vision
    'LayerNorm_2': 'norm2',  # vision_transformer
    'Dense_0': 'mlp.fc1',
    'Dense_1': 'mlp.fc2',
    'out': 'attn.proj',
}


def init_from_backbone(path, model, rng, say=print):
    """Parameters of a detector with the ViT in `path`, fresh [DET] tokens and fresh heads.

    As `finetune_det` of the reference (models/backbone.py): patch positions are resampled to the model's
    grid, those of the [DET] tokens and the mid tables start as noise; of a distilled ViT the position of
    the distillation token becomes that of [CLS].

    Args:
        path: a file, or a Hugging Face folder; no pickle is run.
        model: the `Yolos` to start.
        rng: a jax random key.
        say: called with each line of the report.

    Raises:
        InputError: the file is damaged, no ViT, a detector, or a ViT of another shape.
    """
    file = tensors.read(weights.find_file(path))
    try:
        found, ignored, notes = _read(file)
        width, depth = _size(found)
        if (width, depth) != (model.width, model.depth):
            raise InputError(
                f'a ViT of width {width} and depth {depth}; the model asks for {model.width} and '
                f'{model.depth}'
            )
        batch = np.zeros((1, 1, 3 * PATCH**2), np.uint8), np.ones((1, 2), np.int32)
        fresh = jax.device_get(jax.jit(model.init)(rng, *batch)['params'])
        start = convert.from_params(fresh, model)
        new = {f'backbone.{name}': tensor for name, tensor in found.items()}
        new['backbone.pos_embed'], resampled = _positions(found['pos_embed'], start, model)
        kept = {k: v for k, v in start.items() if not k.startswith('backbone.') or k.endswith(FRESH)}
        params = convert.to_params(new | kept, model)
    except InputError as error:
        raise InputError(f'{file.path}: {error}') from None
    say(f'{file.path}: SHA-256 {file.sha256}')
    used = sorted(set(found) - {'pos_embed'})
    for line in (
        *notes,
        resampled,
        f'used {len(used)}: {weights.summary(used)}',
        f'fresh {len(kept)}: {weights.summary(kept)}, and the [DET] rows of pos_embed',
        f'ignored {len(ignored)}: {weights.summary(ignored) or "nothing"}',
    ):
        say('  ' + line)
    return params


def size(path):
    """Width and depth of the ViT in `path`; raises InputError as `init_from_backbone`."""
    file = tensors.read(weights.find_file(path))
    try:
        return _size(_read(file)[0])
    except InputError as error:
        raise InputError(f'{file.path}: {error}') from None


def _size(found):
    depth = len({name.split('.')[1] for name in found if name.startswith('blocks.')})
    return found['patch_embed.proj.bias'].shape[0], depth


def _positions(table, start, model):
    """The table [1, 1 + n, D] at the model's grid, [DET] rows fresh, and a line that says so."""
    old, side = table.numpy().astype(np.float32), math.isqrt(table.shape[1] - 1)
    patches = posembed.resample(old[0, 1:].reshape(side, side, -1), model.pos_grid)
    det = start['backbone.pos_embed'].numpy()[0, -model.num_det_tokens :]
    new = np.concatenate([old[0, :1], patches.reshape(-1, model.width), det])[None]
    rows, columns = model.pos_grid
    return Tensor(new.shape, lambda: new), f'resampled 1: pos_embed {side}x{side} -> {rows}x{columns}'


def _read(file):
    """A file's ViT under timm's names, with pos_embed [1, 1 + n, D]; the names it has no use for; notes."""
    found, ignored, notes = {}, [], []
    for name, tensor in file.tensors.items():
        short = name
        for prefix in PREFIXES:
            short = short.removeprefix(prefix)
        if IGNORED.match(short):
            ignored.append(name)
        else:
            found[short] = tensor
    if any(name.endswith(('det_token', 'detection_tokens')) for name in found):
        raise InputError('a YOLOS detector and not a backbone; yolos_jax.load reads it')
    mean, std = _pixel_statistics(file.path)
    if 'embedding/kernel' in found:
        found, mean, std = _from_google(found), np.float32([0.5] * 3), np.float32([0.5] * 3)
        _fill_google(found, notes)
    elif any(name.startswith('embeddings.') for name in found):
        found = _from_hf(found)
    if found.pop('dist_token', None):
        ignored.append('dist_token')
    for name in [name for name in found if name.startswith('fc_norm.')]:  # after pooling, in place of norm
        found[name.removeprefix('fc_')] = found.pop(name)
        notes.append(f'{name} becomes {name.removeprefix("fc_")}')
    for name in ('cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'):
        if name not in found:
            raise InputError(f'no ViT: {name} is missing (it has {weights.summary(list(found)[:5])}, ...)')
    found['pos_embed'] = _with_class_row(found['pos_embed'], notes)
    if not (np.allclose(mean, MEAN) and np.allclose(std, STD)):
        notes.append(f'pixels: its mean {mean.tolist()} and deviation {std.tolist()} go into patch_embed')
        _fold(found, mean, std)
    return found, ignored, notes


def _pixel_statistics(path):
    """Mean and deviation of the pixels a ViT was trained on, as its folder says, or ImageNet's."""
    if path.name in weights.HF_FILES:
        for name in ('preprocessor_config.json', 'config.json'):
            try:
                said = json.loads((path.parent / name).read_text())
                said = said.get('pretrained_cfg', said)  # timm's
                keys = ('image_mean', 'image_std') if 'image_mean' in said else ('mean', 'std')
                return tuple(np.array(said[key], np.float32) for key in keys)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
    return MEAN, STD


def _fold(found, mean, std):
    """Bring the patch convolution from pixels of (mean, std) to ours: x' = (x STD + MEAN - mean) / std."""
    weight = found['patch_embed.proj.weight'].numpy().astype(np.float32)
    bias = found['patch_embed.proj.bias'].numpy().astype(np.float32)
    shift = np.einsum('dchw,c->d', weight.astype(np.float64), (MEAN - mean) / std)
    new = {'weight': weight * (STD / std)[:, None, None], 'bias': (bias + shift).astype(np.float32)}
    for name, value in new.items():
        found[f'patch_embed.proj.{name}'] = Tensor(value.shape, lambda value=value: value)


def _with_class_row(table, notes):
    """pos_embed [1, 1 + n, D], n square: from n, 1 + n (class token) or 2 + n (distillation too) rows."""
    if len(table.shape) != 3 or table.shape[0] != 1:
        raise InputError(f'no ViT: pos_embed is {list(table.shape)}')
    _, rows, D = table.shape
    extra = next((k for k in (1, 2, 0) if math.isqrt(max(rows - k, 0)) ** 2 == rows - k > 0), None)
    if extra is None:
        raise InputError(f'its {rows} positions are no square grid')
    if extra == 2:
        notes.append('distilled: the distillation position becomes that of [CLS]')
        return Tensor((1, rows - 1, D), lambda: table.numpy()[:, 1:])
    if extra == 0:
        notes.append('its class token has no position: zero')
        zero = np.zeros((1, 1, D), np.float32)
        return Tensor((1, rows + 1, D), lambda: np.concatenate([zero, table.numpy()], axis=1))
    return table


def _from_hf(found):
    result, parts = {}, {}
    for name, tensor in found.items():
        layer = _HF_LAYER.match(name)
        if layer is None:
            result[convert.rename(name, HF_NAMES)] = tensor
            continue
        inside, prefix = name[layer.end() :], f'blocks.{layer[1]}.'
        if part := _HF_QKV.fullmatch(inside):
            parts.setdefault(f'{prefix}attn.qkv.{part[2]}', {})[part[1]] = tensor
        else:
            result[prefix + convert.rename(inside, HF_BLOCK_NAMES)] = tensor
    return result | _joined(parts)


def _joined(parts):
    for name, three in parts.items():
        if len(three) != 3:
            raise InputError(f'{name}: has {", ".join(three)} and not all of q, k and v')
    return {name: convert.join([three[part] for part in 'qkv']) for name, three in parts.items()}


def _from_google(found):
    """vision_transformer and big_vision: kernels [in, out], blocks apart or stacked ('encoderblock/')."""
    result, parts = {}, {}
    for name, tensor in found.items():
        *path, leaf = name.removeprefix('Transformer/').split('/')
        kind = 'bias' if leaf == 'bias' else 'weight'
        if path == ['embedding'] and leaf == 'kernel':
            H, W, channels, D = tensor.shape
            conv = lambda t=tensor: t.numpy().astype(np.float32).transpose(3, 2, 0, 1)
            result['patch_embed.proj.weight'] = Tensor((D, channels, H, W), conv)
        elif path == ['embedding']:
            result['patch_embed.proj.bias'] = tensor
        elif path == ['encoder_norm']:
            result[f'norm.{kind}'] = tensor
        elif leaf in ('pos_embedding', 'cls'):
            result[{'cls': 'cls_token', 'pos_embedding': 'pos_embed'}[leaf]] = tensor
        elif path and path[0].startswith('encoderblock'):
            stacked = path[0] == 'encoderblock'
            layers = range(tensor.shape[0]) if stacked else [int(path[0].rsplit('_', 1)[1])]
            for i in layers:
                one = _google_leaf(tensor, i if stacked else ..., leaf, path[-1])
                if path[-1] in ('query', 'key', 'value'):
                    parts.setdefault(f'blocks.{i}.attn.qkv.{kind}', {})[path[-1][0]] = one
                else:
                    result[f'blocks.{i}.{_GOOGLE_NAMES.get(path[-1], name)}.{kind}'] = one
        else:
            result[name] = tensor
    return result | _joined(parts)


def _google_leaf(tensor, index, leaf, layer):
    """One block's tensor as torch has it: heads flat, kernels [out, in]."""
    shape = tensor.shape if index is ... else tensor.shape[1:]
    flat = (math.prod(shape),)
    if leaf == 'kernel':
        flat = (math.prod(shape[:-1]), shape[-1]) if layer == 'out' else (shape[0], math.prod(shape[1:]))
    return Tensor(flat[::-1], lambda: tensor.numpy()[index].astype(np.float32).reshape(flat).T)


def _fill_google(found, notes):
    """What big_vision's newer ViTs do without: a class token, and learned positions (sincos2d)."""
    D = found['patch_embed.proj.bias'].shape[0]
    if 'pos_embed' not in found:
        side = 14  # 224 pixels, what these were trained at
        y, x = np.mgrid[:side, :side].reshape(2, -1, 1)
        omega = 10_000 ** -(np.arange(D // 4) / (D // 4 - 1))
        waves = [f(place * omega) for place in (x, y) for f in (np.sin, np.cos)]
        table = np.concatenate(waves, axis=1)[None].astype(np.float32)
        found['pos_embed'] = Tensor(table.shape, lambda: table)
        notes.append('no positions in it: sincos2d of 14x14')
    if 'cls_token' not in found:
        fresh = np.random.default_rng(0).normal(0, 0.02, (1, 1, D)).astype(np.float32)
        found['cls_token'] = Tensor(fresh.shape, lambda: fresh)
        notes.append('no class token in it: fresh')
