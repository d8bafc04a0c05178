"""Reads and writes our own format of weights: Orbax checkpoints, verified when they are read.

A checkpoint is a folder with two items: `state` (of a run: params, opt_state, step; of an export: params
and step) and `meta` (what the model is, its class names, the config, a checksum of every array). Orbax
commits it by one rename, so a killed writer leaves no listed step. Orbax's arrays have no checksums: a
bit flipped on disk would load silently, so the meta has ours.
"""

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax import file_names, files
from yolos_jax.bucket import COMMITTED
from yolos_jax.errors import InputError, StorageError
from yolos_jax.model import Yolos, param_shapes
from yolos_jax.weights import deit, integrity, sizes, step_ap
from yolos_jax.weights.pretrained import Pretrained, by_path

FOLDER = 'checkpoints'  # of a run, in its workdir
STATE, META = 'state', 'meta'
FORMAT = 2  # of the meta
ABOUT_RUN = 'config', 'AP', 'step', 'training', 'goodput', 'energy'  # of the meta, for a detector's `about`
MODEL_FIELDS = (
    'width', 'depth', 'heads', 'pos_grid', 'mid_pos_grid', 'num_classes', 'num_det_tokens', 'registers',
    'rope', 'eps',
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
    """The steps in a folder of checkpoints, ascending; empty for another folder."""
    folder = Path(folder)
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(step for step in numbers if (folder / str(step) / COMMITTED).exists())


def read(folder: str | Path, step: int | None = None) -> Pretrained:
    """The detector in a folder of checkpoints: of `step` or, when None, the best by AP, else the newest.

    If the best is damaged, the next best is read, and a line on stderr says so.

    Raises:
        InputError: there is no checkpoint, or none is intact.
    """
    params, meta = read_params(folder, step)
    try:
        classes = {int(number): name for number, name in meta['classes'].items()}
        of_run = {key: meta[key] for key in ABOUT_RUN if key in meta}
        if meta['step'] == 0 and 'step' in meta['about']:  # `write` saves a run's weights as step 0
            of_run['step'] = meta['about']['step']
        about = meta['about'] | of_run
        return Pretrained(model_of(meta['model']), params, classes, *meta['eval_size'], about)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f'{folder}: the meta of step {meta["step"]} cannot be used ({error})') from None


def model_of(fields: dict) -> Yolos:
    """The model of a meta; raises InputError if it is out of bounds, or of a later version."""
    if unknown := ', '.join(sorted(fields.keys() - set(MODEL_FIELDS))):
        raise InputError(f'its model has {unknown}, which a later version wrote: update yolos_jax')
    model = Yolos(**fields)
    sizes.check(model)
    return model


def read_params(folder: str | Path, step: int | None = None) -> tuple[dict, dict]:
    """The parameters (numpy) and meta of a checkpoint, chosen as by `read`; raises as it does.

    meta is what was saved, with 'step', and 'AP' if it was measured.
    """
    folder = Path(folder).absolute()
    if not (step_aps := aps(folder)):
        raise InputError(f'{folder}: no checkpoint in this folder')
    check_detector(folder)
    order = sorted(step_aps, key=lambda step: (step_ap.rank(step_aps[step]), step), reverse=True)
    problems = []
    for candidate in order if step is None else [step]:
        path = folder / str(candidate)
        try:
            meta = read_meta(path)
            params = _read_arrays(path / STATE, meta)
            problem = integrity.difference(params, meta['checksums'])
        except Exception as error:  # Orbax and TensorStore have no common error for damage
            problem = error
        if not problem:
            if problems:
                print(f'{"; ".join(problems)}; step {candidate} is read instead', file=sys.stderr)
            ap = step_aps.get(candidate)
            (params,) = params.values()
            return params, meta | {'step': candidate} | ({} if ap is None else {'AP': ap})
        if path.exists():
            problems.append(f'{path}: damaged or no checkpoint of this project: {str(problem)[:200]}')
        else:
            problems.append(f'{path}: is gone; a run keeps its newest and best steps only')
    raise InputError('; '.join(problems))


def check_detector(folder: Path) -> None:
    """Raises InputError if the checkpoints in a folder are those of a pre-training."""
    if 'classifier' in newest_meta(folder):
        raise InputError(
            f'{folder}: checkpoints of a pre-training run; a detector starts from {deit.FILE}, which the '
            'first evaluation of the run writes'
        )


def read_meta(path: Path) -> dict:
    """The meta of a step's folder; raises ValueError if it is not what was saved."""
    meta = json.loads((path / COMMITTED).read_text())
    # version 0.1 had neither key; no single flipped bit changes both
    if ('sha256' in meta) != ('format' in meta) or 'sha256' in meta and meta['sha256'] != _digest(meta):
        raise ValueError('its meta is not what was saved')
    return meta


def newest_meta(folder: str | Path) -> dict:
    """The meta of the newest step in a folder whose meta can be read; empty if there is none."""
    folder = Path(folder)
    for step in reversed(steps(folder) if folder.is_dir() else []):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            return read_meta(folder / str(step))
    return {}


def sealed(meta: dict) -> dict:
    """A meta with its format number and a hash of everything else in it."""
    meta = json.loads(json.dumps(meta | {'format': FORMAT}))  # as it comes back from a file
    return meta | {'sha256': _digest(meta)}


def _digest(meta: dict) -> str:
    return integrity.hash_of({key: value for key, value in meta.items() if key != 'sha256'})


def _read_arrays(path: Path, meta: dict) -> dict:
    """The parameters under `path` as numpy arrays, {'params' or, of a run with one, 'ema': parameters}.

    Raises ValueError if their names and shapes are not those of the meta's model.
    """
    import orbax.checkpoint as ocp  # here, as below: importing it takes 25 MB and 0.2 s

    reader = ocp.PyTreeCheckpointHandler()
    tree = reader.metadata(path).tree
    kind = 'ema' if 'ema' in tree else 'params'
    stored = tree[kind]
    shapes = lambda tree: {path: tuple(x.shape) for path, x in by_path(tree).items()}
    if shapes(stored) != shapes(param_shapes(model_of(meta['model']))):
        raise ValueError('its arrays are not those of its model')
    # arrays are not compressed: some larger than their files would only fill the memory
    claimed = sum(4 * math.prod(shape) for shape in shapes(stored).values())
    if claimed > 2 * sum(file.stat().st_size for file in path.rglob('*')) + 1_000_000:
        raise ValueError('its arrays claim more bytes than its files have')

    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {kind: stored})
    args = ocp.args.PyTreeRestore({kind: stored}, restore_args=as_numpy, partial_restore=True)
    return reader.restore(path, args=args)


def check_path(folder: str | Path) -> None:
    """Raises InputError for a path that Orbax or TensorStore takes for another, or that is not UTF-8."""
    path = str(Path(folder).absolute())
    if wrong := next((c for c in '[\\' if c in path), None):
        raise InputError(f'{folder}: checkpoints cannot be in a folder with {wrong} in its path')
    if not file_names.is_utf8(path):
        raise InputError(f'{folder}: checkpoints cannot be in a folder whose path is not UTF-8')


def write(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a folder with one checkpoint of the detector.

    Raises:
        InputError: `folder` is not empty, cannot be written, or its path is not possible (`check_path`).
    """
    import orbax.checkpoint as ocp

    check_path(folder)
    pretrained.check()
    # no copy if the device is the CPU and the arrays are aligned, as those of `names.to_params` are
    params = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), pretrained.params)
    items = contents({'params': params, 'step': jnp.int32(0)}, describe(pretrained))
    with files.new_folder(folder) as part:
        try:
            with ocp.CheckpointManager(part, item_handlers=handlers()) as manager:
                manager.save(0, args=items)
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            raise StorageError(f'{folder}: cannot be written ({reason_of(error)})') from error


def reason_of(error: Exception) -> str:
    """Why Orbax could not write or read, without the names of its temporary files."""
    text = ' '.join(str(error).split())
    code = re.search(r"\[os_error_code='(\d{1,4})'", text)
    return os.strerror(int(code[1])) if code else text[:300]


def handlers() -> dict:
    """Orbax's writers of the two items."""
    import orbax.checkpoint as ocp

    # weights hardly compress, and compressed copies of them all would be in memory at once
    return {STATE: ocp.PyTreeCheckpointHandler(use_compression=False), META: ocp.JsonCheckpointHandler()}


def contents(state: dict, meta: dict) -> Any:
    """The two items as Orbax's arguments for a save; the checksums go into the meta."""
    import orbax.checkpoint as ocp

    meta = sealed(meta | {'checksums': integrity.checksums(state)})
    return ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(state), META: ocp.args.JsonSave(meta)})


def aps(folder: Path) -> dict[int, float | None]:
    """The AP of each step in a folder of checkpoints, as `step_ap.read`."""
    return {step: step_ap.read(folder / str(step)) for step in steps(folder)}
