"""Checkpoints: saved by Orbax, verified when read.

A folder of checkpoints holds one folder per step with two items: `state` (params, opt_state, step) and
`meta` (what the model is, its class names, the config, a checksum of every array). Orbax commits a step
by one rename, so a killed run leaves whole steps. Its arrays carry no checksum: a bit flipped on disk
would load silently, so we keep our own.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from yolos_jax import cluster
from yolos_jax.errors import InputError

STATE, META = 'state', 'meta'
TRASH = '_trash'


class Checkpoints:
    """The checkpoints of a run: the newest two and the one of best AP are kept."""

    def __init__(self, folder):
        self.folder = Path(folder).absolute()
        if cluster.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            _set_aside_unreadable(self.folder)
        cluster.wait('checkpoints')
        best = BestN(get_metric_fn=_ap, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                # weights hardly compress, and compressed copies of them all would be in memory at once
                STATE: ocp.PyTreeCheckpointHandler(use_compression=False),
                META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
                best_fn=_ap,  # without it the metrics are not written
                cleanup_tmp_directories=True,
                todelete_subdir=TRASH,  # one rename: removal in place could leave half a step
            ),
        )

    def save(self, state, meta, ap=None):
        """Save in the background under the state's step; `ap` is the validation AP, if measured.

        Raises:
            InputError: the save before this one failed (a full disk, say), or this one was not
                taken because a later step is there.
        """
        step = int(state['step'])
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            **{
                STATE: ocp.args.PyTreeSave(state),
                META: ocp.args.JsonSave(meta | {'checksums': checksums(state)}),
            }
        )
        with self._said('a save failed'):
            self._sweep()
            taken = self._manager.save(step, args=items, metrics={'AP': ap}, force=True)
        if not taken:
            raise InputError(f'{self.folder}: step {step} was not taken; a later one is there')

    def restore(self, like):
        """The newest (state, meta) that is whole for all processes, each array placed as in `like`.

        None in an empty folder. Damaged steps are renamed broken-STEP once an older one has proved whole.

        Raises:
            InputError: a step is of another model (names, shapes or types differ), or no step is
                whole.
        """
        damaged, found = {}, sorted(self._manager.all_steps(), reverse=True)
        cluster.agree({f'what is in {self.folder}': found})
        for step in found:
            path, problem = self.folder / str(step), None
            try:
                state, meta, sums = self._read(step, path, like)
            except InputError:
                raise
            except Exception as error:  # Orbax and TensorStore have no common error for damage
                problem = error
            if not cluster.anywhere(problem):
                problem = _difference(state, sums)  # which all compute together
            if cluster.anywhere(problem):
                damaged[path] = problem or 'another process could not read it'
                continue
            if cluster.is_first():
                for path, problem in damaged.items():
                    print(f'{path} is damaged, set aside as broken-{path.name}: {problem}')
                    path.rename(path.with_name(f'broken-{path.name}'))
            cluster.wait('damaged checkpoints')
            self._manager.reload()
            return state, meta
        if damaged:
            reasons = '; '.join(f'{path.name}: {problem}' for path, problem in damaged.items())
            raise InputError(f'{self.folder}: no checkpoint is whole ({reasons})')
        return None

    def _read(self, step, path, like):
        meta = json.loads((path / META / 'metadata').read_text())
        _compare(like, self._manager.item_metadata(step)[STATE], path)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        # not by the manager, which would wait for processes that failed
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed)
        state = ocp.PyTreeCheckpointHandler().restore(path / STATE, args=args)
        return state, meta, dict(meta['checksums'])

    def close(self):
        """Wait for the save under way, if any.

        Raises:
            InputError: it failed.
        """
        with self._said('the last save failed'):
            self._sweep()
            self._manager.close()

    def _sweep(self):
        """Once the save under way is done, remove the steps it replaced."""
        self._manager.wait_until_finished()
        if cluster.is_first():
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    @contextlib.contextmanager
    def _said(self, what):
        try:
            yield
        except Exception as error:  # as above
            raise InputError(f'{self.folder}: {what}: {error}') from error


def write(folder, params, meta):
    """A folder with one checkpoint, of weights alone."""
    # not copied where the device is the CPU and the arrays are aligned, as `convert.to_params` makes them
    params = jax.tree.map(lambda x: jax.device_put(x, may_alias=True), params)
    saved = Checkpoints(folder)
    saved.save({'params': params, 'step': jnp.int32(0)}, meta)
    saved.close()


def steps(folder):
    """The steps in a folder of checkpoints; none where it is something else."""
    found = [int(path.name) for path in Path(folder).iterdir() if path.name.isdigit()]
    return sorted(step for step in found if (Path(folder) / str(step) / META / 'metadata').exists())


def read(folder, step=None):
    """The parameters (numpy) and meta of a checkpoint: the best by AP, else the newest, or `step`.

    meta is what was saved, with 'step', and 'AP' where it was measured.

    Raises:
        InputError: there is none, or its arrays are not those that were saved.
    """
    folder = Path(folder).absolute()
    found = steps(folder)
    if not found:
        raise InputError(f'{folder}: no checkpoint in this folder')
    step = max(found, key=lambda step: (_saved_ap(folder / str(step)), step)) if step is None else step
    path = folder / str(step)
    try:
        meta = json.loads((path / META / 'metadata').read_text())
        state = {'params': _read_params(path / STATE)}
        problem = _difference(state, meta['checksums'])
    except Exception as error:
        problem = error
    if problem:
        raise InputError(f'{path}: damaged or no checkpoint of this project: {problem}')
    ap = _saved_ap(path)
    return state['params'], meta | {'step': step} | ({'AP': ap} if math.isfinite(ap) else {})


def _read_params(path):
    """The parameters under `path` as numpy arrays, read one by one: all at once needs twice the memory."""
    reader = ocp.PyTreeCheckpointHandler()

    def one(keys, leaf):
        for key in reversed(keys):
            leaf = {key.key: leaf}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {'params': leaf})
        args = ocp.args.PyTreeRestore({'params': leaf}, restore_args=as_numpy, partial_restore=True)
        (value,) = jax.tree.leaves(reader.restore(path, args=args))
        return value

    return jax.tree_util.tree_map_with_path(one, reader.metadata(path).tree['params'])


def checksums(tree):
    """A checksum of every array, {path: int}: the same under every sharding, changed by any bit."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # one at a time, for they may be copied to the device
    return {jax.tree_util.keystr(path, simple=True, separator='/'): int(_checksum(x)) for path, x in leaves}


@jax.jit
def _checksum(x):
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * size}')).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        stride = stride * x.shape[axis] % (1 << 32)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _difference(state, expected):
    """Which arrays have not the checksums expected, or None."""
    wrong = [name for name, value in checksums(state).items() if expected.get(name) != value]
    return f'not what was saved: {", ".join(wrong[:5])}' if wrong else None


def _compare(like, stored, path):
    """Names, shapes and types must be those asked for: Orbax would cast silently."""
    describe = lambda tree: {
        jax.tree_util.keystr(keys): f'{list(leaf.shape)} {np.dtype(leaf.dtype).name}'
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    wanted, found = describe(like['params']), describe(stored['params'])
    wrong = [
        f'{name} is {found.get(name, "missing")}, not {wanted.get(name, "expected")}'
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        raise InputError(
            f'{path}: a checkpoint of another model ({"; ".join(wrong[:3])}); use another workdir, or '
            'start from it with --config.init_from'
        )


def _set_aside_unreadable(folder):
    """A step whose metrics cannot be parsed keeps Orbax from opening the folder at all."""
    for path in folder.iterdir():
        if not path.name.isdigit():
            continue
        try:
            for file in path.glob('metrics/metrics'):
                json.loads(file.read_text())
            complete = (path / META).is_dir() and (path / STATE).is_dir()
        except (OSError, ValueError):
            complete = False
        if not complete:
            print(f'{path} is damaged, set aside as broken-{path.name}')
            path.rename(folder / f'broken-{path.name}')


def _ap(metrics):
    """The AP to rank by; a NaN would make Orbax delete the best step."""
    value = (metrics or {}).get('AP')
    return value if value is not None and math.isfinite(value) else -math.inf


def _saved_ap(path):
    try:
        return _ap(json.loads((path / 'metrics' / 'metrics').read_text()))
    except (OSError, ValueError):
        return -math.inf
