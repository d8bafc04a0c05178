"""The training loop."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from yolos_jax import evaluation, visualize
from yolos_jax.data import loader
from yolos_jax.errors import InputError
from yolos_jax.run import cluster, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.checkpoints import Checkpoints
from yolos_jax.run.progress import Log, Means, Throughput
from yolos_jax.run.setup import Setup, prepare
from yolos_jax.run.stop import StopSignal
from yolos_jax.weights import checkpoint

GIVE_UP = 10  # steps in a row whose loss or gradient is not finite


class Step(NamedTuple):
    """What `on_step` is given of a step."""

    number: int  # 0 is the first
    image_ids: np.ndarray  # of this process's rows
    length: int  # of the sequences, in patches
    metrics: dict  # arrays that may still be computed


def train(
    config: ConfigDict,
    folder: str | Path,
    mesh: Mesh | None = None,
    on_step: Callable[[Step], None] | None = None,
    stuck: int = 1800,
) -> None:
    """Train as a config of `configs` says; resumes what an earlier call left in the folder.

    Args:
        config: `configs.common` describes its values.
        folder: receives metrics.jsonl, TensorBoard files, curves.png and checkpoints/.
        mesh: of `run.mesh`; all devices when None.
        on_step: called after each step was dispatched.
        stuck: seconds without a step after which the process ends (`cluster.watchdog`).

    Raises:
        InputError: the config, the data, the weights or the folder cannot be used, or the loss was not
            finite for ten steps in a row.
    """
    mesh = meshes.make_mesh() if mesh is None else mesh
    with workdir.locked(folder) as folder, cluster.watchdog(stuck) as progress:
        setup = prepare(config, folder, mesh)
        state, means, about, checkpoints = resume(config, folder, setup)
        first = int(state['step'])
        log = Log(folder, first, setup.total, speaks=cluster.is_first())
        log.print(summary(config, mesh, setup, first))

        programs, throughput, stop = {}, Throughput(), StopSignal()
        rows = meshes.rows_of_process(config.batch_size, mesh)
        for step, batch, indices in loader.load(setup.batches, range(first, setup.total), rows):
            batch = meshes.shard(batch, mesh)
            length = batch['patches'].shape[1]
            if length not in programs:
                programs[length] = compile_step(setup.train_step, state, batch, mesh, log)
                throughput.restart()
            state, metrics = programs[length](state, batch)
            means.add(metrics)
            throughput.add(config.batch_size)
            log.advance()
            progress()
            if on_step:
                on_step(Step(step, setup.batches.records.ids[indices], length, metrics))

            done = step + 1
            epoch, left = divmod(done, setup.batches.steps_per_epoch)
            logs, stops = done % config.log_every == 0, stop.after(step)
            evaluates = left == 0 and (epoch % config.eval_every == 0 or done == setup.total)
            saves = evaluates or stops or done % config.save_every == 0
            if logs or saves or left == 0:
                means.settle()
            check_finite(means, done)
            if logs:
                speed, rate = throughput.images_per_s(), float(setup.rate(step))
                log.write(done, means.mean('window') | {'images_per_s': speed, 'learning_rate': rate})
                means.restart('window')
                throughput.restart()
            if left == 0:
                log.write(done, {f'epoch_{name}': x for name, x in means.mean('epoch').items()})
                means.restart('epoch')
            ap = evaluate(setup, state['params'], rows, done, log, progress) if evaluates else None
            if saves:
                checkpoints.save(state, about | {'means': means.state()}, ap)
                throughput.restart()
            if stops:
                log.print(f'stopped after step {done}; the same command resumes here')
                break
        checkpoints.close()
        log.close()
        if cluster.is_first():
            visualize.curves(folder)


def check_finite(means: Means, done: int) -> None:
    """Raises InputError where too many steps in a row had no finite loss and gradient."""
    if means.nonfinite_streak >= GIVE_UP:
        raise InputError(
            f'the loss was not finite in {GIVE_UP} steps up to step {done}; none of them was applied. A '
            'smaller learning rate often helps',
            'learning_rate',
        )


def resume(config: ConfigDict, folder: Path, setup: Setup) -> tuple[dict, Means, dict, Checkpoints]:
    """The state and means to train on from, what every checkpoint says, and the folder's checkpoints."""
    checkpoints = Checkpoints(folder / 'checkpoints')
    about = checkpoint.describe(setup.start) | {'config': workdir.flat(config)}
    if restored := checkpoints.restore(setup.state):
        state, meta = restored
        workdir.check_same(meta['config'], about['config'], folder)
        means = meta.get('means') or meta['tally']  # what version 0.1 called them
        return state, Means(means), about, checkpoints
    return setup.state, Means(), about, checkpoints


def summary(config: ConfigDict, mesh: Mesh, setup: Setup, first: int) -> str:
    """What a run is about to do, for the reader; `tools.check_data` says more about the data."""
    train_set, (lengths, waste) = setup.batches.records, setup.batches.waste()
    objects = np.diff(train_set.first)
    dropped = ', '.join(f'{count} {reason}' for reason, count in train_set.dropped.items())
    parameters = sum(x.size for x in jax.tree.leaves(setup.start.params))
    return '\n'.join(
        [
            f'devices      {mesh.size} x {mesh.devices.flat[0].device_kind}, '
            f'processes {jax.process_count()}, jax {jax.__version__}',
            f'parameters   {parameters:,}',
            f'data         {len(train_set)} images to train, {len(setup.val_batches.records)} to evaluate, '
            f'{len(setup.start.classes)} classes, {config.data}',
            f'objects      {objects.sum()}, at most {objects.max()} in an image; left out: {dropped}',
            f'sequences    {" ".join(map(str, lengths))} patches, {waste:.1%} padding',
            f'steps        {config.epochs} epochs of {setup.batches.steps_per_epoch}, from step {first}',
        ]
    )


def compile_step(train_step: Callable, state: dict, batch: dict, mesh: Mesh, log: Log) -> Callable:
    """The training step compiled for this batch's shapes: once for each length of sequences."""
    clock = time.monotonic()
    with jax.set_mesh(mesh):
        program = train_step.lower(state, batch).compile()
    B, N, _ = batch['patches'].shape
    log.print(f'compiled for {B} sequences of {N} patches in {time.monotonic() - clock:.0f} s')
    return program


def evaluate(setup: Setup, params: dict, rows: slice, done: int, log: Log, progress: Callable) -> float:
    """The AP on the validation split; all twelve numbers are logged. progress: called after each batch."""
    predict = functools.partial(setup.predict, params)
    results = evaluation.detect(
        predict, setup.val_batches, rows=rows, gather=cluster.gather, on_batch=progress
    )
    ap = None
    if cluster.is_first():
        numbers, _ = evaluation.score(setup.val_batches.records.annotation_file, results)
        log.print(evaluation.table(numbers))
        log.write(done, numbers)
        ap = numbers['AP']
    return cluster.from_first(ap)
