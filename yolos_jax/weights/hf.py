"""Hugging Face's form of weights: YOLOS folders read and written, and the names of its ViTs.

Tensors go through the reference's names (hustvl/YOLOS), in which q, k and v are one tensor.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import MEAN, PATCH, STD
from yolos_jax.weights import model_card, names, sizes, statistics, tensors
from yolos_jax.weights.pretrained import Pretrained
from yolos_jax.weights.tensors import Tensor, TensorFile

FILES, (CONFIG, PREPROCESSOR) = tensors.WITH_CONFIG, tensors.BESIDE
SIZE, UNBOUNDED = (800, 1333), 100_000  # of images where preprocessor_config.json does not say
EPS = 1e-12  # of LayerNorm where config.json does not say
UNUSED = 'N/A'  # the name of a number that is no class

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
_LAYER = re.compile(r'(?:vit\.)?(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)\.')
_QKV = re.compile(r'attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)')
_BLOCK = re.compile(r'backbone\.blocks\.(\d+)\.')


def has_config(file: TensorFile) -> bool:
    """Whether a file holds a YOLOS under Hugging Face's names, with its config.json beside it."""
    return has_names(file.tensors) and (file.path.parent / CONFIG).exists()


def has_names(tensors: dict) -> bool:
    """Whether tensors carry Hugging Face's names of a YOLOS."""
    return any(name.startswith('vit.') for name in tensors)


def read(file: TensorFile) -> Pretrained:
    """The detector of a Hugging Face folder, whose file of tensors is open.

    Raises:
        InputError: config.json cannot be read, or is that of another model.
    """
    try:
        return _read(file, _read_config(file.path.parent))
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{CONFIG} cannot be used ({error})') from None


def _read(file: TensorFile, config: dict) -> Pretrained:
    tensors, preprocessor = to_reference(file.tensors), _read_preprocessor(file.path.parent)
    mean, std = statistics.read(preprocessor)
    if statistics.differ(mean, std):
        statistics.fold(tensors, 'backbone.patch_embed.proj.', mean, std)
        print(f'{file.path}: {statistics.report(mean, std)}', file=sys.stderr)
    grid = tuple(side // PATCH for side in config['image_size'])
    model = Yolos(
        width=config['hidden_size'],
        depth=config['num_hidden_layers'],
        heads=config['num_attention_heads'],
        pos_grid=grid,
        mid_pos_grid=grid if config.get('use_mid_position_embeddings', True) else None,
        num_classes=num_classes(tensors),
        num_det_tokens=config['num_detection_tokens'],
        eps=config.get('layer_norm_eps', EPS),
    )
    sizes.check(model)
    classes = {int(k): v for k, v in (config.get('id2label') or {}).items() if v != UNUSED}
    params = names.to_params(tensors, model)
    return Pretrained(model, params, classes, *_size(preprocessor))


def _read_config(folder: Path) -> dict:
    """config.json; raises InputError where it is not that of a YOLOS we can build."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{CONFIG} cannot be read ({error})') from None
    if not isinstance(config, dict):
        raise InputError(f'{CONFIG} holds no JSON object')
    fixed = {
        'model_type': 'yolos',
        'hidden_act': 'gelu',
        'patch_size': PATCH,
        'num_channels': 3,
        'qkv_bias': True,
        'intermediate_size': 4 * config.get('hidden_size', 0),
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f'{CONFIG} says {key} is {config[key]!r}; only {value!r} works')
    needed = (
        'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_detection_tokens', 'image_size',
    )  # fmt: skip
    if missing := [key for key in needed if key not in config]:
        raise InputError(f'{CONFIG} does not say {", ".join(missing)}')
    return config


def _read_preprocessor(folder: Path) -> dict:
    """preprocessor_config.json, empty where there is none; raises InputError where it cannot be read."""
    try:
        content = json.loads((folder / PREPROCESSOR).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{PREPROCESSOR} cannot be read ({error})') from None
    if not isinstance(content, dict):
        raise InputError(f'{PREPROCESSOR} holds no JSON object')
    return content


def _size(preprocessor: dict) -> tuple[int, int]:
    """The shorter side that images are resized to, and the bound of the longer, as transformers has them.

    Raises:
        InputError: images are resized in another way.
    """
    size, bound = preprocessor.get('size', {}), preprocessor.get('max_size')
    if not preprocessor.get('do_resize', True):
        raise InputError(f'{PREPROCESSOR} does not resize images, which is how a detector has its size')
    if size == {}:
        return SIZE
    size = {'shortest_edge': size} if isinstance(size, int) else size
    is_side = lambda side: isinstance(side, int) and PATCH <= side <= UNBOUNDED
    if isinstance(size, dict) and all(map(is_side, size.values())):
        keys, side = set(size), size.get('max_height')
        if keys == {'max_height', 'max_width'} and side == size['max_width']:
            return side, side
        if 'shortest_edge' in keys and keys <= {'shortest_edge', 'longest_edge'}:
            return size['shortest_edge'], size.get('longest_edge') or bound or UNBOUNDED
    raise InputError(
        f'{PREPROCESSOR} resizes images to {json.dumps(size)[:80]}; what can be read is a shortest_edge, '
        'with or without a longest_edge, or an equal max_height and max_width'
    )


def num_classes(tensors: dict) -> int:
    """C of the reference's tensors: the class head has a row more, for "no object"."""
    name = 'class_embed.layers.2.bias'
    if name not in tensors:
        raise InputError(f'no YOLOS detector: {name} is missing')
    return tensors[name].shape[0] - 1


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

    A bias of q and v alone has zeros for k: DINOv3's keys have none.
    """
    for name, three in parts.items():
        if set(three) == set('qv') and name.endswith('.bias'):
            shape = three['q'].shape
            three['k'] = Tensor(shape, lambda shape=shape: np.zeros(shape, np.float32))
        if set(three) != set('qkv'):
            raise InputError(f'{name}: has {", ".join(three)} and not all of q, k and v')
    return {name: _concatenated([three[part] for part in 'qkv']) for name, three in parts.items()}


def _concatenated(parts: list) -> Tensor:
    rows, *rest = parts[0].shape
    return Tensor((len(parts) * rows, *rest), lambda: np.concatenate([part.numpy() for part in parts]))


def _thirds(tensor: Any) -> list[Tensor]:
    rows = tensor.shape[0] // 3
    part = lambda i: lambda: tensor.numpy()[i * rows : (i + 1) * rows]
    return [Tensor((rows, *tensor.shape[1:]), part(i)) for i in range(3)]


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


def rename(name: str, table: Any) -> str:
    """A name with the first prefix of `table` [(old, new)] that it has replaced."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a folder that transformers' `from_pretrained` takes.

    Raises:
        InputError: the mid tables are of another grid than the first, which this form cannot say, or
            `folder` is not empty.
    """
    model = pretrained.model
    check_form(model)
    if model.mid_pos_grid not in (None, model.pos_grid):
        raise InputError(
            f'Hugging Face has one size for all position tables, and these are {model.pos_grid} and '
            f'{model.mid_pos_grid}; resample them to one size first',
            'new_pos_grid',
        )
    with files.new_folder(folder) as part:
        path = part / FILES[0]
        tensors.write_safetensors(path, from_reference(names.from_params(pretrained.params, model)))
        files.write_json(part / CONFIG, _config(pretrained))
        files.write_json(part / PREPROCESSOR, _preprocessor(pretrained))
        tensors.write_hash(path, part / CONFIG, part / PREPROCESSOR)
        (part / 'README.md').write_text(model_card.text(pretrained))


def check_form(model: Yolos) -> None:
    """Raises InputError where a model has what the original and transformers do not know."""
    if model.registers or model.rope or model.pos_grid is None:
        raise InputError(
            "registers and rotary positions are unknown to transformers' YOLOS and the original code; "
            'safetensors, with a config.json of our own, says all',
            'to',
        )


def _config(pretrained: Pretrained) -> dict:
    model = pretrained.model
    labels = {str(i): pretrained.classes.get(i, UNUSED) for i in range(model.num_classes)}
    return {
        'architectures': ['YolosForObjectDetection'],
        'model_type': 'yolos',
        'hidden_size': model.width,
        'intermediate_size': 4 * model.width,
        'num_hidden_layers': model.depth,
        'num_attention_heads': model.heads,
        'num_detection_tokens': model.num_det_tokens,
        'image_size': [PATCH * side for side in model.pos_grid],
        'patch_size': PATCH,
        'num_channels': 3,
        'qkv_bias': True,
        'use_mid_position_embeddings': model.mid_pos_grid is not None,
        'layer_norm_eps': model.eps,
        'hidden_act': 'gelu',
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'id2label': labels,
        'label2id': {label: int(i) for i, label in labels.items()},
        'torch_dtype': 'float32',
    }


def _preprocessor(pretrained: Pretrained) -> dict:
    return {
        'image_processor_type': 'YolosImageProcessor',
        'format': 'coco_detection',
        'do_resize': True,
        'size': {'shortest_edge': pretrained.size, 'longest_edge': pretrained.max_size},
        'resample': 2,  # PIL's bilinear
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': MEAN.astype(float).round(3).tolist(),
        'image_std': STD.astype(float).round(3).tolist(),
        'do_pad': True,
    }
