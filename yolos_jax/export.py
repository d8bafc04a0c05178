"""Detectors written out: as Hugging Face's folder, as the reference's file, as our checkpoint.

Every form is written beside its place and moved there whole, so a killed conversion leaves nothing that
loads.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from yolos_jax import checkpoints, convert, files, tensors, torchfile, weights
from yolos_jax.errors import InputError
from yolos_jax.model import MEAN, PATCH, STD


def to_jax(found, folder):
    """Write `weights.Weights` as a checkpoint folder of ours."""
    with _whole(folder) as part:
        checkpoints.write(part, found.params, weights.describe(found))


def to_yolos(found, folder):
    """Write folder/yolos.pth, which the reference loads with strict=True."""
    model = found.model
    sides = lambda grid: [PATCH * side for side in grid] if grid else None
    content = {
        'model': convert.from_params(found.params, model),
        'args': {
            'init_pe_size': sides(model.pos_grid),
            'mid_pe_size': sides(model.mid_pos_grid),
            'det_token_num': model.num_det_tokens,
            'heads': model.heads,
            'eval_size': found.size,
            'max_size': found.max_size,
        },
        'classes': found.classes,
        'eps': model.eps,
    }
    with _whole(folder) as part:
        torchfile.write(part / 'yolos.pth', content)
        _write_hash(part / 'yolos.pth')


def to_hf(found, folder):
    """Write a folder that transformers' `from_pretrained` takes.

    Raises:
        InputError: the mid tables are of another grid than the first, which Hugging Face's form cannot say.
    """
    model = found.model
    if model.mid_pos_grid not in (None, model.pos_grid):
        raise InputError(
            f'Hugging Face has one size for all position tables, and these are {model.pos_grid} and '
            f'{model.mid_pos_grid}; bring them to one with --new_pos_grid'
        )
    with _whole(folder) as part:
        path = part / 'model.safetensors'
        tensors.write_safetensors(path, convert.to_hf(convert.from_params(found.params, model)))
        _write_hash(path)
        files.write_json(part / 'config.json', _hf_config(found))
        files.write_json(part / 'preprocessor_config.json', _hf_preprocessor(found))
        (part / 'README.md').write_text(model_card(found))


def _hf_config(found):
    model = found.model
    names = {str(i): found.classes.get(i, weights.UNUSED) for i in range(model.num_classes)}
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
        'id2label': names,
        'label2id': {name: int(i) for i, name in names.items()},
        'torch_dtype': 'float32',
    }


def _hf_preprocessor(found):
    return {
        'image_processor_type': 'YolosImageProcessor',
        'format': 'coco_detection',
        'do_resize': True,
        'size': {'shortest_edge': found.size, 'longest_edge': found.max_size},
        'resample': 2,  # PIL's bilinear
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': MEAN.astype(float).round(3).tolist(),
        'image_std': STD.astype(float).round(3).tolist(),
        'do_pad': True,
    }


def model_card(found):
    """README.md of a Hugging Face folder: what is known of the detector, and no more."""
    model, about, config = found.model, found.about, found.about.get('config', {})
    ap = f'{about["AP"]:.3f} on {config["val_split"]}' if 'AP' in about else 'not measured'
    recipe = [
        f'* {name}: {config[key]}'
        for name, key in (
            ('epochs', 'epochs'),
            ('images per step', 'batch_size'),
            ('learning rate', 'learning_rate'),
            ('weight decay', 'weight_decay'),
            ('shorter sides in training', 'augment.sizes'),
            ('training split', 'train_split'),
        )
        if key in config
    ]
    names = ', '.join(name for _, name in sorted(found.classes.items()))
    source = f'{about["source"]}, SHA-256 {about["sha256"]}' if 'source' in about else 'no other weights'
    return '\n'.join(
        [
            '---',
            'library_name: transformers',
            'pipeline_tag: object-detection',
            'tags: [object-detection, yolos, vision]',
            '---',
            '# YOLOS detector',
            '',
            'You Only Look at One Sequence (arXiv 2106.00666): a plain ViT with [DET] tokens, written by',
            'yolos_jax.',
            '',
            '| | |',
            '|---|---|',
            f'| width, depth, heads | {model.width}, {model.depth}, {model.heads} |',
            f'| [DET] tokens | {model.num_det_tokens} |',
            f'| position tables | {model.pos_grid[0]}x{model.pos_grid[1]} patches of {PATCH} pixels |',
            f'| AP | {ap} |',
            f'| from | {source} |',
            '',
            '## Input and output',
            '',
            f'An RGB image, its shorter side resized to {found.size} pixels and the longer one to at most',
            f'{found.max_size}, normalised by the mean and deviation of preprocessor_config.json. Give one',
            'image at a time: padding of a batch changes the detections of transformers\' YOLOS.',
            '',
            f'`logits` [B, {model.num_det_tokens}, {model.num_classes + 1}], the last "no object", and',
            f'`pred_boxes` [B, {model.num_det_tokens}, 4], cxcywh in 0..1 of the image.',
            '',
            f'Classes: {names}.',
            *(['', '## Training', '', *recipe] if recipe else []),
            '',
        ]
    )  # fmt: skip


def _write_hash(path):
    path.with_name(path.name + '.sha256').write_text(f'{tensors.sha256(path)}  {path.name}\n')


def check_free(folder):
    """Raises InputError where there is something at `folder` already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f'{folder}: exists and is not empty; give another --output')


@contextlib.contextmanager
def _whole(folder):
    """A folder beside `folder` to write to; it takes that name at the end.

    Raises:
        InputError: there is something at `folder` already, or it cannot be written.
    """
    check_free(folder)
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}-'))
    except OSError as error:
        raise InputError(f'{folder}: cannot write there ({error.strerror})') from None
    try:
        yield part
        part.chmod(0o755)  # mkdtemp's is private
        os.replace(part, folder)
    except OSError as error:
        raise InputError(f'{folder}: cannot write there ({error.strerror})') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
