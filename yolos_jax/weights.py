"""A detector's weights from any file they come in, and into our own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors

from yolos_jax import checkpoints, convert, model, torchfile, unpickle
from yolos_jax.data import coco
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos

PUBLISHED = (model.YOLOS_TI, model.YOLOS_S, model.YOLOS_S_DWR, model.YOLOS_B)
REFERENCE_EPS, HF_EPS = 1e-6, 1e-12  # of LayerNorm where a file does not say


@dataclasses.dataclass(frozen=True)
class Weights:
    """A detector: its model, parameters, class names {id: name} and what it was evaluated at.

    size, max_size: the shorter side images are resized to, and the bound of the longer, in pixels.
    """

    model: Yolos
    params: dict
    classes: dict
    size: int
    max_size: int


def load(path, **unknown):
    """A detector as (model, params), from whatever holds it: see `read`."""
    weights = read(path, **unknown)
    return weights.model, weights.params


def read(path, heads=None, pos_grid=None, mid_pos_grid=None):
    """The detector in `path`.

    path: a folder of our checkpoints (a run's workdir too), a Hugging Face folder or a file of one, or a
        file of the reference (.pth). No pickle is run.
    heads, pos_grid, mid_pos_grid: what a .pth of a model that is not a published one does not say.

    Raises:
        InputError: nothing usable is there, or the file does not say what it must.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f'{path}: no such file or folder')
    if path.is_dir():
        return _read_folder(path)
    tensors, arguments = _read_file(path)
    if (path.parent / 'config.json').exists() and any(name.startswith('vit.') for name in tensors):
        return _from_hf(path, tensors)
    return _from_reference(path, tensors, arguments, heads, pos_grid, mid_pos_grid)


def _read_folder(path):
    for folder in (path, path / 'checkpoints'):
        if folder.is_dir() and checkpoints.steps(folder):
            return _from_checkpoint(folder)
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if (path / name).exists() and (path / 'config.json').exists():
            return _from_hf(path / name, _read_file(path / name)[0])
    raise InputError(
        f'{path}: neither a checkpoint folder of yolos_jax nor a Hugging Face folder (config.json with '
        'model.safetensors or pytorch_model.bin)'
    )


def _from_checkpoint(folder):
    params, meta = checkpoints.read(folder)
    fields = meta['model'] | {
        name: tuple(meta['model'][name]) for name in ('pos_grid', 'mid_pos_grid') if meta['model'][name]
    }
    classes = {int(number): name for number, name in meta['classes'].items()}
    return Weights(Yolos(**fields), params, classes, *meta['eval_size'])


def describe(weights):
    """What a checkpoint's meta must hold for `read`."""
    fields = ('width', 'depth', 'heads', 'pos_grid', 'mid_pos_grid')
    fields += ('num_classes', 'num_det_tokens', 'eps')
    return {
        'model': {name: getattr(weights.model, name) for name in fields},
        'classes': {str(number): name for number, name in weights.classes.items()},
        'eval_size': [weights.size, weights.max_size],
    }


def _read_file(path):
    """The tensors of a file {name: array} and its training arguments (None if it has none)."""
    with open(path, 'rb') as file:
        start = file.read(9)
    if start[8:9] == b'{':  # safetensors: a length, then JSON
        try:
            with safetensors.safe_open(path, 'numpy') as file:
                return {name: file.get_tensor(name) for name in file.keys()}, None
        except safetensors.SafetensorError as error:
            raise InputError(f'{path}: damaged or no safetensors file: {error}') from None
    content = torchfile.read(path)
    if not isinstance(content, dict):
        raise InputError(f'{path}: holds a {type(content).__name__}, not weights')
    arguments = content.get('args')
    for key in ('model', 'state_dict'):
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {
        name.removeprefix('module.'): value.numpy()
        for name, value in content.items()
        if isinstance(value, unpickle.Tensor)
    }
    if not tensors:
        raise InputError(f'{path}: no tensors in it')
    return tensors, arguments if isinstance(arguments, dict) else None


def _from_hf(path, tensors):
    config = json.loads((path.parent / 'config.json').read_text())
    fixed = {
        'model_type': 'yolos',
        'hidden_act': 'gelu',
        'patch_size': 16,
        'num_channels': 3,
        'qkv_bias': True,
        'intermediate_size': 4 * config.get('hidden_size', 0),
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f'{path.parent}/config.json: {key} is {config[key]!r}, only {value!r} works')
    grid = tuple(side // model.PATCH for side in config['image_size'])
    names = config.get('id2label') or {}
    built = Yolos(
        width=config['hidden_size'],
        depth=config['num_hidden_layers'],
        heads=config['num_attention_heads'],
        pos_grid=grid,
        mid_pos_grid=grid if config.get('use_mid_position_embeddings', True) else None,
        num_classes=len(names) or tensors['class_labels_classifier.layers.2.bias'].shape[0] - 1,
        num_det_tokens=config['num_detection_tokens'],
        eps=config.get('layer_norm_eps', HF_EPS),
    )
    params = _checked(path, convert.from_hf(tensors), built)
    return Weights(built, params, {int(k): v for k, v in names.items()}, *_hf_size(path.parent))


def _hf_size(folder):
    try:
        size = json.loads((folder / 'preprocessor_config.json').read_text())['size']
        return size['shortest_edge'], size['longest_edge']
    except (OSError, KeyError, TypeError, ValueError):
        return 800, 1333


def _from_reference(path, tensors, arguments, heads, pos_grid, mid_pos_grid):
    if any(name.startswith('vit.') for name in tensors):
        tensors = convert.from_hf(tensors)
    need = ('backbone.pos_embed', 'backbone.det_token', 'class_embed.layers.2.bias')
    lacking = [name for name in need if name not in tensors]
    if lacking:
        raise InputError(f'{path}: no YOLOS detector: {", ".join(lacking)} missing')
    arguments = arguments or {}
    width = tensors['backbone.pos_embed'].shape[-1]
    depth = sum(name.endswith('.norm1.weight') for name in tensors)
    tokens = tensors['backbone.det_token'].shape[1]
    twin = next((p for p in PUBLISHED if (p['width'], p['depth']) == (width, depth)), {})

    def grid_of(name, given, argument):
        table = tensors.get(f'backbone.{name}')
        if table is None:
            return None
        rows = table.shape[-2] - 1 - tokens
        said = arguments.get(argument)
        said = said and tuple(side // model.PATCH for side in said)
        for grid in (given, said, twin.get(name.replace('embed', 'grid'))):
            if grid and grid[0] * grid[1] == rows:
                return tuple(grid)
        raise InputError(
            f'{path}: does not say the grid of its {name} ({rows} rows); give it as ROWS COLUMNS'
        )

    built = Yolos(
        width=width,
        depth=depth,
        heads=heads or twin.get('heads') or _lacking(path, 'heads'),
        pos_grid=grid_of('pos_embed', pos_grid, 'init_pe_size'),
        mid_pos_grid=grid_of('mid_pos_embed', mid_pos_grid, 'mid_pe_size'),
        num_classes=tensors['class_embed.layers.2.bias'].shape[0] - 1,
        num_det_tokens=tokens,
        eps=REFERENCE_EPS,
    )
    size = arguments.get('eval_size') or (512 if width == model.YOLOS_TI['width'] else 800)
    numbered = {i: f'class {i}' for i in range(built.num_classes)}
    classes = coco.CLASSES if built.num_classes == 91 else numbered
    params = _checked(path, tensors, built)
    return Weights(built, params, classes, size, size * 1333 // 800)


def _lacking(path, what):
    raise InputError(f'{path}: does not say its {what}; give it')


def _checked(path, tensors, built):
    try:
        return convert.to_params(tensors, built)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None


def with_classes(weights, classes, rng):
    """The detector with a class head for `classes` {id: name}, and a line that says what was kept.

    Rows of classes of the same name, and of "no object", are kept; others start as the reference's do.
    """
    last = weights.params['class_embed']['layers_2']
    old = {name.lower(): number for number, name in weights.classes.items()}
    count = max(classes) + 1
    bound = last['kernel'].shape[0] ** -0.5
    generator = np.random.default_rng(rng)
    fresh = lambda *shape: generator.uniform(-bound, bound, shape).astype(np.float32)
    kernel, bias = fresh(last['kernel'].shape[0], count + 1), fresh(count + 1)
    pairs = [(number, old[name.lower()]) for number, name in classes.items() if name.lower() in old]
    for new, known in [*pairs, (count, weights.model.num_classes)]:
        kernel[:, new], bias[new] = last['kernel'][:, known], last['bias'][known]
    head = weights.params['class_embed'] | {'layers_2': {'kernel': kernel, 'bias': bias}}
    changed = dataclasses.replace(
        weights,
        model=weights.model.clone(num_classes=count),
        params=weights.params | {'class_embed': head},
        classes=dict(classes),
    )
    return changed, f'class head: {len(classes)} classes, {len(pairs)} of them kept, the rest fresh'


def check_classes(weights, classes, source):
    """Raises InputError where `classes` {id: name} of `source` are not those of the detector."""
    known = {number: name.lower() for number, name in weights.classes.items()}
    other = [f'{i} {name!r}' for i, name in classes.items() if known.get(i) != name.lower()]
    if other:
        raise InputError(
            f'{source}: its classes are not those of the weights (the first: {", ".join(other[:3])}); '
            'for a new class head say --config.reset_classes=True'
        )
