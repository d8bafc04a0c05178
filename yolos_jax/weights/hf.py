"""Reads and writes YOLOS detectors as Hugging Face folders."""

import json
import sys
from pathlib import Path

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.patches import MEAN, PATCH, STD
from yolos_jax.weights import hf_names, model_card, names, safetensors, sizes, statistics, tensors
from yolos_jax.weights.pretrained import UNBOUNDED, Pretrained, about_ids
from yolos_jax.weights.tensors import CONFIG, PREPROCESSOR, SAFETENSORS, TensorFile

SIZE = 800, 1333  # of images where preprocessor_config.json does not say
EPS = 1e-12  # of LayerNorm where config.json does not say
BILINEAR = 2  # PIL's number for the only filter that images are resized with
UNUSED = 'N/A'  # the name of an id that has no class
FIXED = {  # values in the config.json of every model that can be read
    'model_type': 'yolos', 'patch_size': PATCH, 'num_channels': 3, 'qkv_bias': True, 'hidden_act': 'gelu',
}  # fmt: skip


def has_config(file: TensorFile) -> bool:
    """Whether a file holds a YOLOS under Hugging Face's names, with its config.json beside it."""
    return hf_names.has_names(hf_names.unwrapped(file.tensors)) and (file.path.parent / CONFIG).exists()


def read(file: TensorFile) -> Pretrained:
    """The detector of a Hugging Face folder, whose file of tensors is open.

    Raises:
        InputError: config.json cannot be read, or is that of another model.
    """
    config, preprocessor = _read_config(file), file.beside(PREPROCESSOR)
    by_name = hf_names.to_reference(hf_names.unwrapped(file.tensors))
    for line in statistics.fold(by_name, 'backbone.patch_embed.proj.', *statistics.read(preprocessor)):
        print(f'{file.path}: {line}', file=sys.stderr)
    if 'size' not in preprocessor:
        print(
            f"{file.path}: no {PREPROCESSOR} with a size beside it: images are resized by transformers' "
            f'default, to {SIZE[0]} pixels and at most {SIZE[1]}, which may not be how it was trained',
            file=sys.stderr,
        )
    if preprocessor.get('resample', BILINEAR) != BILINEAR:
        print(f'{file.path}: {PREPROCESSOR} resizes by another filter than bilinear', file=sys.stderr)
    grid = tuple(side // PATCH for side in config['image_size'])
    model = Yolos(
        width=config['hidden_size'],
        depth=config['num_hidden_layers'],
        heads=config['num_attention_heads'],
        pos_grid=grid,
        mid_pos_grid=grid if config.get('use_mid_position_embeddings', True) else None,
        num_classes=names.num_classes(by_name),
        num_det_tokens=config['num_detection_tokens'],
        eps=config.get('layer_norm_eps', EPS),
    )
    sizes.check(model)
    # transformers' own names where there are none
    labels = config.get('id2label') or {i: f'LABEL_{i}' for i in range(model.num_classes)}
    classes = {int(k): v for k, v in labels.items() if v != UNUSED}
    if unnamed := [k for k, v in classes.items() if not isinstance(v, str)]:
        raise InputError(f'id2label of {CONFIG} has {labels[str(unnamed[0])]!r} as the name of a class')
    if classes and max(classes) >= model.num_classes:
        raise InputError(
            f'id2label of {CONFIG} names a class {max(classes)}, but the head has {model.num_classes} '
            'classes: number them from 0, as the head does'
        )
    params = names.to_params(by_name, model)
    about = about_ids(config.get('category_ids'))
    return Pretrained(model, params, classes, *_size(preprocessor, file.path), about)


def _read_config(file: TensorFile) -> dict:
    """config.json; raises InputError if it is not that of a YOLOS we can build."""
    config = file.beside(CONFIG)
    fixed = FIXED | {'intermediate_size': 4 * config.get('hidden_size', 0)}
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f'{CONFIG} says {key} is {config[key]!r}; only {value!r} works')
    needed = (
        'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_detection_tokens', 'image_size',
    )  # fmt: skip
    if missing := [key for key in needed if key not in config]:
        raise InputError(f'{CONFIG} does not say {", ".join(missing)}')
    for key, form, what in (('image_size', list, '[height, width]'), ('id2label', dict, '{number: name}')):
        if not isinstance(config.get(key) or form(), form):
            raise InputError(f'{CONFIG} says {key} is {json.dumps(config[key])[:80]}, not {what}')
    return config


def _size(preprocessor: dict, path: Path) -> tuple[int, int]:
    """The shorter side that images are resized to, and the bound of the longer, as transformers has them.

    Raises:
        InputError: images are resized in another way, or padded to one size.
    """
    size, bound = preprocessor.get('size', {}), preprocessor.get('max_size')
    if not preprocessor.get('do_resize', True):
        raise InputError(f'{PREPROCESSOR} does not resize images, which is how a detector has its size')
    if preprocessor.get('do_pad', True) and (padded := preprocessor.get('pad_size')):
        raise InputError(
            f'{PREPROCESSOR} pads images to {json.dumps(padded)[:80]}, and boxes are relative to that; '
            'here they are relative to the image. To train on from these weights, remove its pad_size'
        )
    if size == {}:
        return SIZE
    if isinstance(size, int):
        size, bound = {'shortest_edge': size}, bound or SIZE[1]  # transformers' default beside a number
    if isinstance(size, dict):
        size = {key: side for key, side in size.items() if side is not None}
    is_side = lambda side: isinstance(side, int) and PATCH <= side <= UNBOUNDED
    if isinstance(size, dict) and all(map(is_side, size.values())):
        keys, side = set(size), size.get('max_height')
        if keys == {'max_height', 'max_width'} and side == size['max_width']:
            print(
                f'{path}: transformers cuts off pixels beyond the last whole patch of {PATCH}; here images '
                'are resized to whole patches, so detections may differ a little',
                file=sys.stderr,
            )
            return side, side
        if 'shortest_edge' in keys and keys <= {'shortest_edge', 'longest_edge'}:
            return size['shortest_edge'], size.get('longest_edge') or bound or UNBOUNDED
    raise InputError(
        f'{PREPROCESSOR} resizes images to {json.dumps(size)[:80]}; what can be read is a shortest_edge, '
        'with or without a longest_edge, or an equal max_height and max_width'
    )


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a folder that transformers' `from_pretrained` takes.

    Raises:
        InputError: the mid tables are of another grid than the first, which this form cannot say, or
            `folder` is not empty.
    """
    pretrained.check()
    model = pretrained.model
    check_form(model)
    if model.mid_pos_grid not in (None, model.pos_grid):
        raise InputError(
            f'Hugging Face has one size for all position tables, and these are {model.pos_grid} and '
            f'{model.mid_pos_grid}; resample them to one size first',
            'new_pos_grid',
        )
    with files.new_folder(folder) as part:
        path, by_name = part / SAFETENSORS, names.from_params(pretrained.params, model)
        safetensors.write(path, hf_names.from_reference(by_name))
        files.write_json(part / CONFIG, _config(pretrained))
        files.write_json(part / PREPROCESSOR, _preprocessor(pretrained))
        tensors.write_hash(path, part / CONFIG, part / PREPROCESSOR)
        files.write(part / 'README.md', model_card.text(pretrained, library='transformers').encode())


def check_form(model: Yolos) -> None:
    """Raises InputError if a model has parts that the original and transformers do not support."""
    if model.registers or model.rope or model.pos_grid is None:
        raise InputError(
            "registers and rotary positions are unknown to transformers' YOLOS and the original code; "
            'safetensors, with a config.json of our own, says all',
            'to',
        )


def _config(pretrained: Pretrained) -> dict:
    model = pretrained.model
    labels = {str(i): pretrained.classes.get(i, UNUSED) for i in range(model.num_classes)}
    ids = pretrained.about.get('category_ids')
    return {
        'architectures': ['YolosForObjectDetection'],
        **FIXED,
        'hidden_size': model.width,
        'intermediate_size': 4 * model.width,
        'num_hidden_layers': model.depth,
        'num_attention_heads': model.heads,
        'num_detection_tokens': model.num_det_tokens,
        'image_size': [PATCH * side for side in model.pos_grid],
        'use_mid_position_embeddings': model.mid_pos_grid is not None,
        'layer_norm_eps': model.eps,
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'id2label': labels,
        'label2id': {label: int(i) for i, label in labels.items()},
        'torch_dtype': 'float32',
    } | ({'category_ids': ids} if ids else {})


def _preprocessor(pretrained: Pretrained) -> dict:
    return {
        'image_processor_type': 'YolosImageProcessor',
        'format': 'coco_detection',
        'do_resize': True,
        'size': {'shortest_edge': pretrained.size, 'longest_edge': pretrained.max_size},
        'resample': BILINEAR,
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': MEAN.astype(float).round(3).tolist(),
        'image_std': STD.astype(float).round(3).tolist(),
        'do_pad': True,
    }
