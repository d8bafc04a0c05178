"""The checkpoints of a run: saved by Orbax in the background, verified when a run resumes."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from yolos_jax.errors import InputError
from yolos_jax.run import cluster
from yolos_jax.weights import checkpoint
from yolos_jax.weights.checkpoint import META, STATE

TRASH = '_trash'


class Checkpoints:
    """The checkpoints of a run: the newest two and the one of best AP are kept."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        if cluster.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            _set_aside_unreadable(self.folder)
        cluster.wait('checkpoints')
        best = BestN(get_metric_fn=checkpoint.rank, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=checkpoint.handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
                best_fn=checkpoint.rank,  # without it the metrics are not written
                cleanup_tmp_directories=True,
                todelete_subdir=TRASH,  # one rename: removal in place could leave half a step
            ),
        )

    def save(self, state: dict, meta: dict, ap: float | None = None) -> None:
        """Save in the background under the state's step; `ap` is the validation AP, if measured.

        Raises:
            InputError: the save before this one failed (a full disk, say), or this one was not
                taken because a later step is there.
        """
        step = int(state['step'])
        if step in self._manager.all_steps():
            return
        with self._failing_as('a save failed'):
            self._finish()
            items = checkpoint.contents(state, meta)
            taken = self._manager.save(step, args=items, metrics={'AP': ap}, force=True)
        if not taken:
            raise InputError(f'{self.folder}: step {step} was not taken; a later one is there')

    def restore(self, like: dict) -> tuple[dict, dict] | None:
        """The newest (state, meta) that is whole for all processes, each array placed as in `like`.

        None in an empty folder. Damaged steps are renamed broken-STEP after an older one passes
        verification.

        Raises:
            InputError: a step is of another model (names, shapes or types differ), or no step is
                whole.
        """
        damaged, steps = {}, sorted(self._manager.all_steps(), reverse=True)
        cluster.agree({f'what is in {self.folder}': steps})
        for step in steps:
            path, problem = self.folder / str(step), None
            try:
                state, meta = self._read(step, path, like)
            except InputError:
                raise
            except Exception as error:  # Orbax and TensorStore have no common error for damage
                problem = error
            if not cluster.anywhere(problem):
                problem = checkpoint.difference(state, meta['checksums'])  # which all compute together
            if cluster.anywhere(problem):
                damaged[path] = problem or 'another process could not read it'
                continue
            self._set_aside(damaged)
            return state, meta
        if damaged:
            reasons = '; '.join(f'{path.name}: {problem}' for path, problem in damaged.items())
            raise InputError(f'{self.folder}: no checkpoint is whole ({reasons})')
        return None

    def _read(self, step: int, path: Path, like: dict) -> tuple[dict, dict]:
        meta = json.loads((path / META / 'metadata').read_text())
        _compare(like, self._manager.item_metadata(step)[STATE], path)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        # not by the manager, which would wait for processes that failed
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed)
        state = ocp.PyTreeCheckpointHandler().restore(path / STATE, args=args)
        return state, meta | {'checksums': dict(meta['checksums'])}

    def _set_aside(self, damaged: dict) -> None:
        if cluster.is_first():
            for path, problem in damaged.items():
                print(f'{path} is damaged, set aside as broken-{path.name}: {problem}')
                path.rename(path.with_name(f'broken-{path.name}'))
        cluster.wait('damaged checkpoints')
        self._manager.reload()

    def close(self) -> None:
        """Wait for the save under way, if any.

        Raises:
            InputError: it failed.
        """
        with self._failing_as('the last save failed'):
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        """Wait for the save under way, and remove the steps it replaced."""
        self._manager.wait_until_finished()
        if cluster.is_first():
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    @contextlib.contextmanager
    def _failing_as(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # as above
            raise InputError(f'{self.folder}: {what}: {error}') from error


def _compare(like: dict, stored: dict, path: Path) -> None:
    """Names, shapes and types must be those asked for: Orbax would cast silently."""
    describe = lambda tree: {
        jax.tree_util.keystr(keys): f'{list(leaf.shape)} {np.dtype(leaf.dtype).name}'
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    expected, actual = describe(like['params']), describe(stored['params'])
    wrong = [
        f'{name} is {actual.get(name, "missing")}, not {expected.get(name, "expected")}'
        for name in sorted(expected.keys() | actual.keys())
        if expected.get(name) != actual.get(name)
    ]
    if wrong:
        raise InputError(
            f'{path}: a checkpoint of another model ({"; ".join(wrong[:3])}); use another workdir, or '
            'start from its weights',
            'init_from',
        )


def _set_aside_unreadable(folder: Path) -> None:
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
