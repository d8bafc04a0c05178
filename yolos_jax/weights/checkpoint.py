"""Our form of weights: one Orbax checkpoint, verified when it is read.

A checkpoint is a folder with two items: `state` (of a run: params, opt_state, step; of an export: params
and step) and `meta` (what the model is, its class names, the config, a checksum of every array). Orbax
commits it by one rename, so a killed writer leaves none that is listed. Its arrays carry no checksum: a
bit flipped on disk would load silently, so we keep our own.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import files
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.weights.pretrained import Pretrained

STATE, META = 'state', 'meta'
MODEL_FIELDS = (
    'width', 'depth', 'heads', 'pos_grid', 'mid_pos_grid', 'num_classes', 'num_det_tokens', 'eps',
)  # fmt: skip


def describe(pretrained: Pretrained) -> dict:
    """What a checkpoint's meta must hold for `read`."""
    return {
        'model': {name: getattr(pretrained.model, name) for name in MODEL_FIELDS},
        'classes': {str(number): name for number, name in pretrained.classes.items()},
        'eval_size': [pretrained.size, pretrained.max_size],
        'about': pretrained.about,
    }


def steps(folder: str | Path) -> list[int]:
    """The steps in a folder of checkpoints, ascending; none where it is something else."""
    folder = Path(folder)
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return sorted(step for step in numbers if (folder / str(step) / META / 'metadata').exists())


def read(folder: str | Path, step: int | None = None) -> Pretrained:
    """The detector of a checkpoint in a folder of them: the best by AP, else the newest, or `step`.

    Raises:
        InputError: there is none, or its arrays are not those that were saved.
    """
    params, meta = read_params(folder, step)
    fields = meta['model'] | {
        name: tuple(meta['model'][name]) for name in ('pos_grid', 'mid_pos_grid') if meta['model'][name]
    }
    classes = {int(number): name for number, name in meta['classes'].items()}
    about = meta['about'] | {key: meta[key] for key in ('config', 'AP', 'step') if key in meta}
    return Pretrained(Yolos(**fields), params, classes, *meta['eval_size'], about)


def read_params(folder: str | Path, step: int | None = None) -> tuple[dict, dict]:
    """The parameters (numpy) and meta of a checkpoint, chosen as by `read`; raises as it does.

    meta is what was saved, with 'step', and 'AP' where it was measured.
    """
    folder = Path(folder).absolute()
    available = steps(folder)
    if not available:
        raise InputError(f'{folder}: no checkpoint in this folder')
    if step is None:
        step = max(available, key=lambda step: (saved_ap(folder / str(step)), step))
    path = folder / str(step)
    try:
        meta = json.loads((path / META / 'metadata').read_text())
        state = {'params': _read_arrays(path / STATE)}
        problem = difference(state, meta['checksums'])
    except Exception as error:  # Orbax and TensorStore have no common error for damage
        problem = error
    if problem:
        raise InputError(f'{path}: damaged or no checkpoint of this project: {problem}')
    ap = saved_ap(path)
    return state['params'], meta | {'step': step} | ({'AP': ap} if math.isfinite(ap) else {})


def _read_arrays(path: Path) -> dict:
    """The parameters under `path` as numpy arrays, read one by one: all at once needs twice the memory."""
    import orbax.checkpoint as ocp  # here, as below: it costs every import 25 MB and 0.2 s

    reader = ocp.PyTreeCheckpointHandler()

    def read_array(keys: tuple, leaf: Any) -> np.ndarray:
        for key in reversed(keys):
            leaf = {key.key: leaf}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {'params': leaf})
        args = ocp.args.PyTreeRestore({'params': leaf}, restore_args=as_numpy, partial_restore=True)
        (value,) = jax.tree.leaves(reader.restore(path, args=args))
        return value

    return jax.tree_util.tree_map_with_path(read_array, reader.metadata(path).tree['params'])


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a folder with one checkpoint of the detector.

    Raises:
        InputError: `folder` is not empty, or cannot be written.
    """
    import orbax.checkpoint as ocp

    # not copied where the device is the CPU and the arrays are aligned, as `names.to_params` makes them
    params = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), pretrained.params)
    with files.new_folder(folder) as part, ocp.CheckpointManager(part, item_handlers=handlers()) as manager:
        manager.save(0, args=contents({'params': params, 'step': jnp.int32(0)}, describe(pretrained)))


def handlers() -> dict:
    """Orbax's writers of the two items."""
    import orbax.checkpoint as ocp

    # weights hardly compress, and compressed copies of them all would be in memory at once
    return {STATE: ocp.PyTreeCheckpointHandler(use_compression=False), META: ocp.JsonCheckpointHandler()}


def contents(state: dict, meta: dict) -> Any:
    """The two items as Orbax's arguments for a save; the checksums go into the meta."""
    import orbax.checkpoint as ocp

    meta = meta | {'checksums': checksums(state)}
    return ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(state), META: ocp.args.JsonSave(meta)})


def checksums(tree: dict) -> dict[str, int]:
    """A checksum of every array, {path: int}: the same under every sharding, changed by any bit."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # one at a time, for they may be copied to the device
    return {jax.tree_util.keystr(path, simple=True, separator='/'): int(_checksum(x)) for path, x in leaves}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * size}')).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        stride = stride * x.shape[axis] % (1 << 32)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def difference(state: dict, expected: dict) -> str | None:
    """Which arrays have not the checksums expected, or None."""
    wrong = [name for name, value in checksums(state).items() if expected.get(name) != value]
    return f'not what was saved: {", ".join(wrong[:5])}' if wrong else None


def rank(metrics: dict | None) -> float:
    """The AP to rank a step by, -inf where there is none; a NaN would make Orbax delete the best step."""
    value = (metrics or {}).get('AP')
    return value if value is not None and math.isfinite(value) else -math.inf


def saved_ap(path: Path) -> float:
    """The AP of a step's folder, -inf where it was not measured."""
    try:
        return rank(json.loads((path / 'metrics' / 'metrics').read_text()))
    except (OSError, ValueError):
        return -math.inf
