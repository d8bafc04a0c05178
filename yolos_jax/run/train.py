"""The training loop."""

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from yolos_jax import bucket, forks
from yolos_jax.data import loader
from yolos_jax.errors import DivergedError, InputError, shown
from yolos_jax.run import cluster, curves, detection, watchdog, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.meters import Means
from yolos_jax.run.programs import Programs
from yolos_jax.run.services import Run, measurements, resume
from yolos_jax.run.setup import Setup
from yolos_jax.run.stop import StopRun, StopSignal, interrupts_held
from yolos_jax.weights import checkpoint, step_ap

_training = threading.Lock()
GIVE_UP = 10  # steps in a row whose loss, gradient or new parameters are not finite


class Step(NamedTuple):
    """The argument of `on_step`: a step that was dispatched."""

    number: int  # 0 is the first
    image_ids: np.ndarray  # of this process's rows
    length: int  # of the sequences, in patches
    metrics: dict  # arrays that may still be computed


def train(
    config: ConfigDict,
    workdir: str | Path,
    mesh: Mesh | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    *,
    stuck: int | None = None,
    stop: StopSignal | None = None,
) -> int | None:
    """Train as a config of `configs` says; resumes what an earlier call left in the folder.

    Args:
        config: `configs.common` describes its values.
        workdir: a folder, or the gs:// or s3:// URL of one in a bucket; receives metrics.jsonl,
            TensorBoard files, curves.png, checkpoints/ and, of a detector, README.md (the model card).
        mesh: as `run.mesh.make_mesh` makes it; None: all devices.
        on_step: called after each step was dispatched. If it returns True in every process, the run saves
            and stops.
        stuck: seconds without a step after which the process ends (`watchdog.started`); None: 1,800 with
            several processes, never with one.
        stop: checked after every step; None leaves signals alone, except that Ctrl-C is raised when the
            step is complete, or at once the second time.

    Returns:
        None if the run was trained to its end; the number of the signal that stopped it, or 0 if
        `on_step` did. The same call resumes.

    Raises:
        InputError: the config, the data, the weights or the folder cannot be used.
        DivergedError: the loss was not finite for ten steps in a row, or at the end.
    """
    mesh = check_arguments(config, workdir, mesh)
    prepare = functools.partial(detection.prepare, config, mesh)
    return run_to_end(prepare, workdir, on_step, stuck=stuck, stop=stop)


def check_arguments(config: ConfigDict, location: str | Path, mesh: Mesh | None) -> Mesh:
    """The mesh to train on; raises InputError if an argument of `train` is of another kind."""
    if not isinstance(config, ConfigDict):
        raise InputError(
            f'the config is a {type(config).__name__}, not a ConfigDict; get one by '
            '`from yolos_jax.configs import yolos_ti` and `yolos_ti.get_config()`',
            'config',
        )
    if not location:
        raise InputError('no workdir: name a folder', 'workdir')
    forks.check()
    mesh = meshes.make_mesh() if mesh is None else mesh
    meshes.check(mesh)
    return mesh


def run_to_end(
    prepare: Callable[[workdir.Workdir], Setup],
    location: str | Path,
    on_step: Callable[[Step], bool | None] | None,
    *,
    stuck: int | None,
    stop: StopSignal | None,
) -> int | None:
    """Does the work of `train`, with the setup that `prepare` makes."""
    if not bucket.is_url(location):
        checkpoint.check_path(location)
    if stuck is None and not cluster.is_alone():
        stuck = watchdog.STUCK
    with _alone(), workdir.opened(location) as work, watchdog.started(stuck) as progress:
        setup = prepare(work)
        state, run = resume(setup, work, progress, stop)
        if stop:
            stop.hold()
        try:
            stopped = train_steps(setup, run, state, on_step or (lambda _: None))
            run.checkpoints.wait()
        finally:
            with contextlib.suppress(InputError):  # an error before this one is the one to show
                run.checkpoints.close()
            run.log.close()
        run.log.print(str(run.goodput))
        diverges = stopped is None and run.means.nonfinite_streak
        try:
            write_last_files(setup, run)
        except InputError as error:  # how the run ended is said by the exit status
            if stopped is None and not diverges:
                raise
            run.log.print(str(error))
        if diverges:
            raise diverged(run.means, setup.total)
        return stopped


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Raises InputError if another thread of this process trains: Orbax's saves are counted per process."""
    if not _training.acquire(blocking=False):
        raise InputError('this process trains already; start the second run in a process of its own')
    try:
        yield
    finally:
        _training.release()


def write_last_files(setup: Setup, run: Run) -> None:
    """Write what the folder has of a run that ended or stopped: the curves, and the setup's own files."""
    if not cluster.is_first():
        return
    curves.draw(run.work.folder)
    counts = {'goodput': run.goodput.state(), 'energy': run.energy.joules}
    aps = checkpoint.aps(run.checkpoints.folder)
    setup.finish(run.work.folder, aps, run.meta | counts, run.log)


def train_steps(setup: Setup, run: Run, state: dict, on_step: Callable) -> int | None:
    """The training loop; returns what `train` returns."""
    config, mesh = setup.config, setup.mesh
    asked = False  # whether `on_step` asked to stop
    complete = False  # whether the state is that after a step of this start
    first = int(state['step'])
    todo, clip_norm = range(first, setup.total), config.get('clip_norm', np.inf)
    programs = Programs(
        setup.train_step,
        mesh,
        state=state,
        empty=functools.partial(setup.batches.empty, config.batch_size),
        lengths=setup.lengths_from(first) if todo else np.zeros(0, np.int64),
        log=run.log.print,
    )
    try:
        if evaluate_if_due(setup, run, state, first):  # an earlier start may have ended before it
            return None
        for step, batch, indices in loader.load(setup.batches, todo, setup.rows, setup.threads):
            batch = meshes.shard(batch, mesh)
            program = programs.of(batch['patches'].shape[1], run.while_compiling)
            clock, ids = time.monotonic(), setup.image_ids(indices)
            with interrupts_held():
                complete = False
                state, metrics = program(state, batch)
                run.means.add(metrics | {'clipped': metrics['grad_norm'] > clip_norm}, ids)
                run.goodput.add(time.monotonic() - clock)
                run.throughput.add(config.batch_size)
                run.log.advance()
                run.progress()
                try:
                    asked = is_true(on_step(Step(step, ids, batch['patches'].shape[1], metrics)))
                finally:
                    stops = run.stops() or asked
                    finish_step(setup, run, state, step, stops=stops)
                    complete = True  # a checkpoint of this step continues as the run would have
            if stops:
                raise StopRun
            if evaluate_if_due(setup, run, state, step + 1):
                return None
    except StopRun:
        # without a step there is nothing to lose, and a new run may start again with another config
        saved = int(state['step']) == first or run.save(state)
        run.checkpoints.wait()
        where = 'here' if saved else 'from the last checkpoint, as the loss is not finite'
        run.log.print(f'stopped after step {int(state["step"])}; the same command resumes {where}')
        return 0 if asked else run.stop.number or signal.SIGTERM
    except BaseException:
        if complete:
            rescue(run, state)
        jax.tree.map(lambda x: x.delete(), state)  # a notebook keeps the traceback, which holds the state
        raise
    finally:
        programs.close()
    return None


def is_true(answer: Any) -> bool:
    """Whether `on_step` returned True, as a bool of Python, NumPy or JAX; other values mean nothing."""
    is_bool = isinstance(answer, bool) or getattr(answer, 'dtype', None) == np.bool_ and answer.shape == ()
    return is_bool and bool(answer)


def evaluate_if_due(setup: Setup, run: Run, state: dict, done: int) -> bool:
    """Evaluate if it is due after `done` steps; returns whether the run ends for lack of progress."""
    if not setup.evaluates_after(done):
        return False
    if cluster.anywhere(run.checkpoints.ap(done) is None):
        best = run.checkpoints.best()
        best_ap = -np.inf if best is None else step_ap.rank(run.checkpoints.ap(best))
        ap = setup.evaluate(state, done, run.log, run.after_batch, best_ap)
        run.checkpoints.note_ap(done, cluster.broadcast(ap))
        run.throughput.restart()
    patience = setup.config.patience
    best = run.checkpoints.best() if patience else None
    if best is None or done - best < patience * setup.batches.steps_per_epoch:
        return False
    run.log.print(f'no improvement since step {best}, for {patience} epochs; the run ends')
    return True


def finish_step(setup: Setup, run: Run, state: dict, step: int, *, stops: bool) -> None:
    """Log and save what is due after a step."""
    config, means, done = setup.config, run.means, step + 1
    per_epoch = setup.batches.steps_per_epoch
    epoch_ends = done % per_epoch == 0
    logs = done % config.log_every == 0 or epoch_ends and per_epoch < config.log_every
    saves = stops or setup.evaluates_after(done) or config.save_every and done % config.save_every == 0
    if logs or saves or epoch_ends:
        clock = time.monotonic()
        means.settle()
        run.goodput.add(time.monotonic() - clock)
    for text, ids in means.pop_spikes():
        run.log.print(f'at about step {done}: {text}; images {shown(cluster.gather(ids), 16)}')
    if means.nonfinite_streak >= GIVE_UP:
        raise diverged(means, done)
    if logs:
        run.log.write(done, means.pop_mean('window') | measurements(setup, run, step))
        if cluster.is_first():
            run.energy.update()
            if run.work.mirror:
                run.work.mirror.push_now_and_then()
        run.throughput.restart()
    if epoch_ends:
        run.log.write(done, {f'epoch_{name}': x for name, x in means.pop_mean('epoch').items()})
    if saves:
        run.save(state)
        run.throughput.restart()


def rescue(run: Run, state: dict) -> None:
    """Save the last step, if possible, before the error being handled ends the run."""
    whole = not any(x.is_deleted() for x in jax.tree.leaves(state))  # a failed step may have donated it
    if whole and cluster.is_alone():
        with contextlib.suppress(Exception):  # the first error is the one to show
            run.save(state)


def diverged(means: Means, done: int) -> DivergedError:
    """The error of a run whose loss is not finite any more."""
    return DivergedError(
        f'the loss was not finite in {means.nonfinite_streak} steps up to step {done} (or the gradient, or '
        f'the new parameters); none of them was saved. The last had the images '
        f'{shown(cluster.gather(means.image_ids), 16)}. A smaller learning rate often helps',
        'learning_rate',
    )
