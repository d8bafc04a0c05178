"""A detector's weights, from any file they come in."""

import dataclasses
import json
import re
from pathlib import Path

from yolos_jax import convert, model, tensors
from yolos_jax.data import coco
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos

PUBLISHED = (model.YOLOS_TI, model.YOLOS_S, model.YOLOS_S_DWR, model.YOLOS_B)
REFERENCE_EPS, HF_EPS = 1e-6, 1e-12  # of LayerNorm where a file does not say
UNUSED = 'N/A'  # Hugging Face's name for a number that is no class
HF_FILES = 'model.safetensors', 'pytorch_model.bin'


@dataclasses.dataclass(frozen=True)
class Weights:
    """A detector: its model, parameters, class names {id: name} and what it was evaluated at.

    size, max_size: the shorter side images are resized to, and the bound of the longer, in pixels.
    about: where it is from: 'source' and 'sha256' of a file; 'config', 'AP' and 'step' of a run.
    """

    model: Yolos
    params: dict
    classes: dict
    size: int
    max_size: int
    about: dict = dataclasses.field(default_factory=dict)


def load(path, **unsaid):
    """A detector as (model, params), from whatever holds it: see `read`."""
    weights = read(path, **unsaid)
    return weights.model, weights.params


def read(path, heads=None, pos_grid=None, mid_pos_grid=None, say=lambda line: None):
    """The detector in `path`.

    path: a folder of our checkpoints (a run's workdir too), a Hugging Face folder or a file of one, or a
        file of the reference (.pth). No pickle is run.
    heads, pos_grid, mid_pos_grid: what a .pth of a model that is not a published one does not say.
    say: called with each line of the report on a file.

    Raises:
        InputError: nothing usable is there, or the file does not say what it must.
    """
    path = Path(path)
    if folder := checkpoint_folder(path):
        return _from_checkpoint(folder)
    file = tensors.read(find_file(path))
    if not _is_detector(file):
        raise InputError(
            f'{file.path}: no YOLOS detector (no [DET] tokens in it); a backbone to train from goes to '
            '--config.init_from of train.py, or to yolos_jax.init_from_backbone'
        )
    try:
        if _is_hf(file) and (config := file.path.parent / 'config.json').exists():
            found = _from_hf(file, _read_json(config))
        else:
            found = _from_reference(file, heads, pos_grid, mid_pos_grid)
    except InputError as error:
        where = '' if str(file.path) in str(error) else f'{file.path}: '
        raise InputError(f'{where}{error}') from None
    say(f'{file.path}: SHA-256 {file.sha256}')
    say(f'  used {len(file.tensors)} tensors: {summary(file.tensors)}')
    say(f'  ignored, for they are no weights: {", ".join(map(str, file.about)) or "nothing"}')
    return found


def summary(names):
    """Names of tensors in a line, numbered ones once."""
    return ', '.join(dict.fromkeys(re.sub(r'(?<=[._])\d+(?=[./])', '*', name) for name in names))


def origin(path):
    """What `Weights.about` says of a file."""
    return _about(tensors.read(find_file(path)))


def holds_detector(path):
    """Whether `path` is a detector, for `read`, or some other file of weights."""
    return bool(checkpoint_folder(path)) or _is_detector(tensors.read(find_file(path)))


def checkpoint_folder(path):
    """The folder of our checkpoints that `path` is, or has; None if it is something else."""
    from yolos_jax import checkpoints  # not above: Orbax costs every import 25 MB and 0.2 s

    for folder in (Path(path), Path(path) / 'checkpoints'):
        if folder.is_dir() and checkpoints.steps(folder):
            return folder
    return None


def find_file(path):
    """The file of tensors that `path` is, or has as a Hugging Face folder.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f'{path}: no such file or folder')
    if not path.is_dir():
        return path
    for name in HF_FILES:
        if (path / name).exists() and (path / 'config.json').exists():
            return path / name
    if (path / f'{HF_FILES[0]}.index.json').exists():
        raise InputError(f'{path}: its weights are in several files; save them again as one')
    raise InputError(
        f'{path}: neither a checkpoint folder of yolos_jax nor a Hugging Face folder (config.json with '
        f'{" or ".join(HF_FILES)})'
    )


def describe(weights):
    """What a checkpoint's meta must hold for `read`."""
    fields = ('width', 'depth', 'heads', 'pos_grid', 'mid_pos_grid')
    fields += ('num_classes', 'num_det_tokens', 'eps')
    return {
        'model': {name: getattr(weights.model, name) for name in fields},
        'classes': {str(number): name for number, name in weights.classes.items()},
        'eval_size': [weights.size, weights.max_size],
        'about': weights.about,
    }


def _from_checkpoint(folder):
    from yolos_jax import checkpoints

    params, meta = checkpoints.read(folder)
    fields = meta['model'] | {
        name: tuple(meta['model'][name]) for name in ('pos_grid', 'mid_pos_grid') if meta['model'][name]
    }
    classes = {int(number): name for number, name in meta['classes'].items()}
    about = meta['about'] | {key: meta[key] for key in ('config', 'AP', 'step') if key in meta}
    return Weights(Yolos(**fields), params, classes, *meta['eval_size'], about)


def _is_hf(file):
    return any(name.startswith('vit.') for name in file.tensors)


def _is_detector(file):
    return any(name.endswith(('det_token', 'detection_tokens')) for name in file.tensors)


def _about(file):
    return {'source': file.path.name, 'sha256': file.sha256}


def _read_json(path):
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f'{path.name} cannot be read ({error})') from None
    if not isinstance(content, dict):
        raise InputError(f'{path.name} holds no JSON object')
    return content


def _from_hf(file, config):
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
            raise InputError(f'config.json says {key} is {config[key]!r}; only {value!r} works')
    sizes = (
        'hidden_size',
        'num_hidden_layers',
        'num_attention_heads',
        'num_detection_tokens',
        'image_size',
    )
    if lacking := [key for key in sizes if key not in config]:
        raise InputError(f'config.json does not say {", ".join(lacking)}')
    width, depth, heads, tokens, image_size = (config[key] for key in sizes)
    grid = tuple(side // model.PATCH for side in image_size)
    names = {int(k): v for k, v in (config.get('id2label') or {}).items() if v != UNUSED}
    built = Yolos(
        width=width,
        depth=depth,
        heads=heads,
        pos_grid=grid,
        mid_pos_grid=grid if config.get('use_mid_position_embeddings', True) else None,
        num_classes=_num_classes(convert.from_hf(file.tensors)),
        num_det_tokens=tokens,
        eps=config.get('layer_norm_eps', HF_EPS),
    )
    params = convert.to_params(convert.from_hf(file.tensors), built)
    return Weights(
        built, params, names, *_hf_size(file.path.parent), {'source': file.path.name, 'sha256': file.sha256}
    )


def _hf_size(folder):
    """The sides in preprocessor_config.json, of which there are two forms."""
    try:
        said = json.loads((folder / 'preprocessor_config.json').read_text())
        size = said['size']
        if isinstance(size, int):
            return size, said['max_size']
        return size['shortest_edge'], size['longest_edge']
    except (OSError, KeyError, TypeError, ValueError):
        return 800, 1333


def _num_classes(found):
    """C: the class head has a row more, for "no object"."""
    name = 'class_embed.layers.2.bias'
    if name not in found:
        raise InputError(f'no YOLOS detector: {name} is missing')
    return found[name].shape[0] - 1


def _from_reference(file, heads, pos_grid, mid_pos_grid):
    prefixed = {name.removeprefix('module.'): tensor for name, tensor in file.tensors.items()}
    found = convert.from_hf(prefixed) if _is_hf(file) else prefixed
    said = file.about.get('args')
    said = said if isinstance(said, dict) else {}
    for name in ('backbone.pos_embed', 'backbone.det_token'):
        if name not in found or len(found[name].shape) != 3:
            raise InputError(f'no YOLOS detector: {name} is missing or of another shape')
    width, tokens = found['backbone.pos_embed'].shape[-1], found['backbone.det_token'].shape[1]
    depth = sum(name.endswith('.norm1.weight') for name in found)
    twin = next((p for p in PUBLISHED if (p['width'], p['depth']) == (width, depth)), {})
    heads = heads or said.get('heads') or twin.get('heads')
    if not heads:
        raise InputError(f'does not say the heads of its {depth} blocks of width {width}; give heads')

    def grid_of(name, given, argument):
        table = found.get(f'backbone.{name}_embed')
        if table is None:
            return None
        rows = table.shape[-2] - 1 - tokens
        sides = said.get(argument)
        written = tuple(side // model.PATCH for side in sides) if sides else None
        for grid in (given, written, twin.get(f'{name}_grid')):
            if grid and grid[0] * grid[1] == rows:
                return tuple(grid)
        raise InputError(
            f'does not say the grid of its {name}_embed ({rows} patches); give {name}_grid as rows, columns'
        )

    built = Yolos(
        width=width,
        depth=depth,
        heads=heads,
        pos_grid=grid_of('pos', pos_grid, 'init_pe_size'),
        mid_pos_grid=grid_of('mid_pos', mid_pos_grid, 'mid_pe_size'),
        num_classes=_num_classes(found),
        num_det_tokens=tokens,
        eps=file.about.get('eps', HF_EPS if _is_hf(file) else REFERENCE_EPS),
    )
    size = said.get('eval_size') or (512 if width == model.YOLOS_TI['width'] else 800)
    max_size = said.get('max_size') or size * 1333 // 800
    classes = file.about.get('classes')
    if not isinstance(classes, dict):
        numbered = {i: f'class {i}' for i in range(built.num_classes)}
        classes = coco.CLASSES if built.num_classes == 91 else numbered
    return Weights(
        built,
        convert.to_params(found, built),
        classes,
        size,
        max_size,
        {'source': file.path.name, 'sha256': file.sha256},
    )
