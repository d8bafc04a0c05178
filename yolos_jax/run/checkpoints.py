"""The checkpoints of a run: saved by Orbax in the background, verified when a run resumes.

If the run is in a bucket, process 0 saves the arrays of all processes to its local copy of the folder, and
`mirror.Mirror` uploads them: Orbax itself can write to Google's buckets, but not to S3.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from yolos_jax import files
from yolos_jax.errors import InputError, StorageError
from yolos_jax.run import cluster
from yolos_jax.run.mirror import Mirror
from yolos_jax.weights import checkpoint, integrity, step_ap
from yolos_jax.weights.checkpoint import META, STATE
from yolos_jax.weights.pretrained import by_path

TRASH = '_trash'
KEPT = 2  # newest steps, beside the best


class Checkpoints:
    """The checkpoints of a run: the newest two and the one of best AP are kept."""

    def __init__(
        self, folder: str | Path, mirror: Mirror | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        """mirror: given if the folder is this process's copy of one in a bucket. check: called before
        anything is changed; raises InputError if the folder is not the run's any more.
        """
        self.folder, self._mirror, self._check = Path(folder).absolute(), mirror, check
        if mirror or cluster.is_first():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = files.why_not(self.folder, error)
                raise InputError(f'{self.folder}: cannot write to it ({reason})') from None
            if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):  # now, and not at the first save
                raise InputError(f'{self.folder}: cannot write to it (Permission denied)')
        if cluster.is_first():
            _tidy(self.folder)
        cluster.barrier('checkpoints')
        if mirror and not cluster.is_first():
            self._manager = None  # this process does not save
            return
        first = dict(primary_host=0, active_processes={0}, barrier_sync_key_prefix='first')
        options = ocp.CheckpointManagerOptions(
            async_options=ocp.AsyncOptions(barrier_sync_fn=_meet({0} if mirror else None)),
            create=False,  # made above
            cleanup_tmp_directories=True,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**first if mirror else {}),
        )
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers=checkpoint.handlers(), options=options
        )

    def save(self, state: dict, meta: dict) -> None:
        """Save in the background under the state's step.

        Raises:
            InputError: the save before this one failed (a full disk, say).
        """
        step = int(state['step'])
        known = self._manager.all_steps() if self._manager else []  # with those being written
        if cluster.broadcast(step in known):
            return
        failed = None
        with self._failing_as('a save failed'):
            try:
                self._wait_and_prune()
            except StorageError as error:  # of the last upload: raised once this step is on the disk
                failed = error
            if self._mirror:
                state = cluster.fetch(state)
            if not self._manager:
                return
            items = checkpoint.contents(state, meta)
            self._manager.save(step, args=items, force=True)
            if failed:
                self._manager.wait_until_finished()
                raise failed
        if self._mirror:
            self._mirror.start_push(after=self._manager.wait_until_finished)

    def note_ap(self, step: int, ap: float) -> None:
        """Record the validation AP of a step if it was saved: the best step is never removed."""
        with self._failing_as('a save failed'):
            self._wait()
            self._check()
            if cluster.is_first() and (self.folder / str(step)).is_dir():
                step_ap.write(self.folder / str(step), ap)
                if self._mirror:
                    self._mirror.start_push()

    def ap(self, step: int) -> float | None:
        """The recorded AP of a step; None if there is none."""
        return step_ap.read(self.folder / str(step))

    def best(self) -> int | None:
        """The step with the best AP, the first of equals; None if no AP was measured."""
        best = cluster.broadcast(self._best())
        return None if np.isnan(best) else int(best)

    def _best(self) -> int | None:
        aps = checkpoint.aps(self.folder)
        measured = [step for step in aps if step_ap.rank(aps[step]) > -np.inf]
        return max(measured, key=lambda step: (aps[step], -step), default=None)

    def restore(self, like: dict) -> tuple[dict, dict] | None:
        """The newest (state, meta) that is intact for all processes, each array placed as in `like`.

        Returns None if the folder is empty. Damaged steps are renamed broken-STEP after an older one
        passes verification.

        Raises:
            InputError: a step is of another model (names, shapes or types differ), or no step is
                whole.
        """
        damaged, folders = {}, [path.name for path in self.folder.iterdir()]
        steps = sorted((int(name) for name in folders if name.isdecimal()), reverse=True)
        cluster.agree({f'what is in {self.folder}': steps})
        for step in steps:
            path, problem = self.folder / str(step), None
            try:
                state, meta = self._read(path, like)
            except InputError:
                raise
            except Exception as error:  # Orbax and TensorStore have no common error for damage
                problem = error
            if not cluster.anywhere(problem):
                problem = integrity.difference(state, meta['checksums'])  # a collective computation
            if cluster.anywhere(problem):
                damaged[path] = problem or 'another process could not read it'
                continue
            if cluster.is_first():
                for path, problem in damaged.items():
                    _set_aside(path, problem)
                    self._note_removed(path)
            cluster.barrier('damaged checkpoints')
            if self._manager:
                self._manager.reload()
            return state, meta
        if damaged:
            reasons = '; '.join(f'{path.name}: {str(problem)[:200]}' for path, problem in damaged.items())
            raise InputError(f'{self.folder}: no checkpoint is intact ({reasons})')
        return None

    def _read(self, path: Path, like: dict) -> tuple[dict, dict]:
        if self._mirror:
            self._mirror.fetch(path)
        if secret := [file for file in path.rglob('*') if not os.access(file, os.R_OK)]:
            raise InputError(f'{secret[0]}: cannot be read (Permission denied)')  # it is not damaged
        meta = checkpoint.read_meta(path)
        _compare(like, ocp.PyTreeCheckpointHandler().metadata(path / STATE).tree, path)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        # not by the manager, which would wait for processes that failed
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed)
        state = ocp.PyTreeCheckpointHandler().restore(path / STATE, args=args)
        # restores the order of axes in memory too, which Orbax ignores
        formats = jax.tree.map(lambda x: x.format, like)
        state = jax.jit(lambda state: state, donate_argnums=0, out_shardings=formats)(state)
        return state, meta | {'checksums': dict(meta['checksums'])}

    def wait(self) -> None:
        """Wait for the save under way, if any; raises InputError if it failed."""
        with self._failing_as('the last save failed'):
            self._wait_and_prune()

    def close(self) -> None:
        """As `wait`; then close the manager."""
        self.wait()
        with self._failing_as('the last save failed'):
            if self._manager:
                self._manager.close()

    def _wait(self) -> None:
        """Wait for the save under way."""
        if self._manager:
            self._manager.wait_until_finished()
            if self._mirror:
                self._mirror.finish_push()

    def _wait_and_prune(self) -> None:
        """Wait for the save under way, and remove the steps that are neither new nor the best.

        A step whose AP cannot be read may be the best, and stays.
        """
        self._wait()
        self._check()
        if cluster.is_first():
            best = self._best()
            for step in checkpoint.steps(self.folder)[:-KEPT]:
                path = self.folder / str(step)
                if step != best and not step_ap.is_damaged(path):
                    (self.folder / TRASH).mkdir(exist_ok=True)
                    path.rename(self.folder / TRASH / path.name)  # atomic: removal could leave half a step
                    self._note_removed(path)
            shutil.rmtree(self.folder / TRASH, ignore_errors=True)

    def _note_removed(self, path: Path) -> None:
        if self._mirror:
            self._mirror.remove(path.name)

    @contextlib.contextmanager
    def _failing_as(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of Orbax and TensorStore, which have no common error
            self._check()
            if cluster.is_of_gloo(error):  # another process is gone; the folder is well
                raise
            raise InputError(f'{self.folder}: {what}: {checkpoint.reason_of(error)}') from error


def _meet(processes: set[int] | None) -> Callable[..., None]:
    """The barrier at which Orbax's thread waits for the other processes at the end of a save.

    If the save failed here, it raises: Orbax's barrier would wait up to 20 minutes for the others.
    """
    wait = ocp.multihost.get_barrier_sync_fn(processes=processes)
    of_run = threading.current_thread()  # the error that it is handling need not be of a save

    def meet(**which: str | int) -> None:
        if threading.current_thread() is not of_run and (error := sys.exception()):
            raise error
        wait(**which)

    return meet


def _tidy(folder: Path) -> None:
    """Rename what would keep Orbax from opening the folder: incomplete steps, and damaged APs.

    Raises:
        InputError: no step is complete.
    """
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    cut = [path for path in steps if not ((path / META).is_dir() and (path / STATE).is_dir())]
    if steps and cut == steps:
        names = ', '.join(sorted(path.name for path in cut))
        raise InputError(f'{folder}: no checkpoint is complete (parts of {names} are missing)')
    for path in steps:
        if path in cut:
            _set_aside(path, 'parts of it are missing')
        elif step_ap.is_damaged(path):
            with contextlib.suppress(FileNotFoundError):
                (path / step_ap.OLD_FILE).rename(path / step_ap.FILE)


def _set_aside(path: Path, problem: object) -> None:
    """Rename a damaged step, so that it is neither read again nor lost."""
    name = f'broken-{path.name}'
    if path.with_name(name).exists():
        name = f'{name}-{time.time_ns()}'
    print(f'{path} is damaged, set aside as {name}: {" ".join(str(problem).split())[:200]}')
    path.rename(path.with_name(name))


def _compare(like: dict, stored: dict, path: Path) -> None:
    """Raises InputError if names, shapes or types are not those of `like`: Orbax would cast silently."""
    describe = lambda tree: {
        name: f'{list(x.shape)} {np.dtype(x.dtype).name}' for name, x in by_path(tree).items()
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
