"""Train a detector.

    python train.py --config=configs/yolos_ti.py --workdir=DIR --config.data=COCO_FOLDER

Any value of the config can be set by --config.key=value. The workdir receives metrics.jsonl, TensorBoard
files, curves.png and checkpoints/; the same command in the same workdir goes on where the last one ended.
"""

import functools
import hashlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from yolos_jax import (
    adapt,
    checkpoints,
    cli,
    cluster,
    evaluation,
    optim,
    run,
    sharding,
    steps,
    visualize,
    weights,
)
from yolos_jax.backbones import init_from_backbone
from yolos_jax.data import geometry, loader, records
from yolos_jax.errors import InputError
from yolos_jax.model import PATCH, Yolos
from yolos_jax.progress import Progress, Tally

CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/.')
WORKDIR = flags.DEFINE_string('workdir', None, 'The folder the run writes to and resumes from.')
COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'host:port of process 0, for a cluster made by hand.'
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Its processes; 1 to be alone in any case.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is: 0, 1, ...')
HEARTBEAT = flags.DEFINE_integer('heartbeat', 30, 'Seconds until a silent process is dead.')
STUCK = flags.DEFINE_integer('stuck', 1800, 'Seconds without a step until one of several processes ends.')
flags.mark_flags_as_required(['config', 'workdir'])


def train(config, workdir, stuck=1800):
    """Train as `config` says, in the folder `workdir`; see `cluster.watch` for `stuck`."""
    # The data, the detector to start from, and the batches
    cluster.watch(stuck)
    mesh = sharding.make_mesh()
    check_batch_size(config, mesh)
    train_set = records.read(config.data, config.train_split, workdir / 'index')
    val_set = records.read(config.data, config.val_split, workdir / 'index')
    start = make_start(config, train_set)
    batches = make_batches(config, train_set, start.model)
    val_batches = loader.EvalBatches(val_set, config.eval_size, config.eval_max_size, config.batch_size)
    per_epoch = batches.steps_per_epoch
    total = config.epochs * per_epoch
    agree(config, workdir, batches, val_set)

    # The optimiser, the steps, and the state they work on
    rate = optim.learning_rate(config.learning_rate, config.epochs, per_epoch)
    optimizer = optim.make_optimizer(start.params, rate, config.weight_decay, config.clip_norm)
    state, layout = make_state(config, start.params, optimizer, mesh)
    groups = config.images_per_group, config.accumulate_steps
    train_step = steps.make_train_step(start.model, optimizer, *groups)
    train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(layout, sharding.whole(mesh)))

    # What an earlier run in this folder left
    saved = checkpoints.Checkpoints(workdir / 'checkpoints')
    about = weights.describe(start) | {'config': run.flat(config)}
    tally = Tally()
    if restored := saved.restore(state):
        state, meta = restored
        run.check_same(meta['config'], about['config'], workdir)
        tally = Tally(meta['tally'])
    first = int(state['step'])
    log = Progress(workdir, first, total)
    log.say(summary(config, mesh, start, batches, val_set, first))

    predict = steps.make_predict_step(start.model)
    programs, stop = {}, run.StopSignal()
    with jax.set_mesh(mesh):
        rows = sharding.rows_of_process(config.batch_size, mesh)
        for step, batch, _ in loader.load(batches, range(first, total), rows):
            batch = sharding.shard(batch, mesh)
            length = batch['patches'].shape[1]
            if length not in programs:
                programs[length] = compile_step(train_step, state, batch, log)
            state, metrics = programs[length](state, batch)
            tally.add(step, metrics)
            log.step(config.batch_size)
            cluster.watch(stuck)

            done = step + 1
            epoch, left = divmod(done, per_epoch)
            ap = None
            if done % config.log_every == 0:
                speed = {'images_per_s': log.images_per_s(), 'learning_rate': float(rate(step))}
                log.write(done, tally.take('window') | speed)
            if left == 0:
                log.write(done, {f'epoch_{k}': v for k, v in tally.take('epoch').items()})
            if left == 0 and (epoch % config.eval_every == 0 or done == total):
                ap = evaluate(predict, state['params'], val_batches, mesh, done, log)
            asked = stop.after(step)
            if ap is not None or done % config.save_every == 0 or asked:
                saved.save(state, about | {'tally': tally.state()}, ap)
                log.start_clock()
            if asked:
                log.say(f'stopped after step {done}; the same command goes on from here')
                break
    saved.close()
    log.close()
    if cluster.is_first():
        visualize.curves(workdir)


def make_batches(config, train_set, model):
    """The run's batches, with bucket lengths chosen from the sizes of the data."""
    if len(train_set) < config.batch_size:
        raise InputError(
            f'{train_set.json}: {len(train_set)} images are less than one batch of {config.batch_size}'
        )
    return loader.TrainBatches.make(
        train_set,
        geometry.Recipe(**config.augment),
        config.num_lengths,
        config.batch_size,
        config.max_targets,
        config.seed,
        special=1 + model.num_det_tokens,
    )


def check_batch_size(config, mesh):
    """Raises InputError where the batch does not divide over devices, parts and groups."""
    sharding.check_divides(config.batch_size, mesh, 'config.batch_size')
    if config.batch_size % config.images_per_group:
        raise InputError(
            f'config.images_per_group is {config.images_per_group}, which does not divide '
            f'config.batch_size, {config.batch_size}'
        )
    rows, parts = config.batch_size // mesh.size, config.accumulate_steps
    if parts < 1 or parts > 1 and rows % (parts * config.images_per_group):
        raise InputError(
            f"config.accumulate_steps is {parts}: a device's {rows} images do not divide into so many "
            f'parts of whole groups of config.images_per_group, {config.images_per_group}'
        )


def make_state(config, params, optimizer, mesh):
    """The state a run starts from, and where its arrays live: on every device, or in parts."""
    init = functools.partial(steps.init_state, optimizer=optimizer)
    shapes = jax.eval_shape(init, params)
    layout = jax.tree.map(lambda _: sharding.whole(mesh), shapes)
    layout = sharding.largest_axis(shapes, mesh) if config.shard_params else layout
    return jax.jit(init, out_shardings=layout)(params), layout


def agree(config, workdir, batches, val_set):
    """Raises InputError where the processes of a run are not about to do the same."""
    cluster.wait('workdir')
    planned = batches.plan(0)[1:]
    cluster.agree(
        {f'config.{key}': value for key, value in run.flat(config).items()}
        | {
            'the workdir': (workdir / run.LOCK).read_text() if (workdir / run.LOCK).exists() else None,
            'the training data': batches.records.digest(),
            'the validation data': val_set.digest(),
            'the plan of batches': [hashlib.sha256(x.tobytes()).hexdigest() for x in planned],
            'the version of jax': jax.__version__,
        }
    )


def make_start(config, train_set):
    """The detector a run starts from: a new one, or with the weights of config.init_from."""
    compute = {'dtype': jnp.dtype(config.model.dtype), 'remat': config.model.remat}
    model = Yolos(**config.model.to_dict() | compute, num_classes=train_set.num_classes)
    classes, about = train_set.classes, {}
    if not config.init_from:
        check_model_is_given(config)
        batch = np.zeros((1, 1, 3 * PATCH**2), np.uint8), np.ones((1, 2), np.int32)
        params = jax.jit(model.init)(jax.random.key(config.seed), *batch)['params']
    elif weights.holds_detector(config.init_from):
        found = weights.read(config.init_from, say=print)
        if config.reset_classes:
            found, said = adapt.with_classes(found, classes, config.seed)
            print(f'  {said}')
        adapt.check_classes(found, classes, train_set.json)
        check_model_is_found(config, found.model)
        model, params, about = found.model.clone(**compute), found.params, found.about
    else:
        check_model_is_given(config)
        params = init_from_backbone(config.init_from, model, jax.random.key(config.seed))
        about = weights.origin(config.init_from)
    about = {key: about[key] for key in ('source', 'sha256') if key in about}
    params = jax.device_get(params)  # devices hold the state alone, which may be in parts
    return weights.Weights(model, params, classes, config.eval_size, config.eval_max_size, about)


def check_model_is_given(config):
    """Raises InputError where the config leaves the model to init_from, and no detector is there."""
    if not config.model.width:
        raise InputError(
            f'config.init_from is {config.init_from!r}, and config.model.width 0: name a detector, or set '
            'the model'
        )


def check_model_is_found(config, found):
    """Raises InputError where the config's model is not that of init_from."""
    for name in ('width', 'depth', 'heads', 'pos_grid', 'mid_pos_grid', 'num_det_tokens'):
        asked, there = config.model[name], getattr(found, name)
        if config.model.width and asked != there:
            raise InputError(
                f'config.model.{name} is {asked}, and {there} in {config.init_from}; to take the model '
                'from there, say --config=configs/finetune.py'
            )


def summary(config, mesh, start, batches, val_set, first):
    """What a run is about to do, for the reader; `yolos_jax.data.check` says more about the data."""
    train_set, (lengths, waste) = batches.records, batches.waste()
    objects = np.diff(train_set.first)
    left_out = ', '.join(f'{count} {reason}' for reason, count in train_set.dropped.items())
    parameters = sum(x.size for x in jax.tree.leaves(start.params))
    used = ' '.join(map(str, lengths))
    return '\n'.join(
        [
            f'devices      {mesh.size} x {mesh.devices.flat[0].device_kind}, '
            f'processes {jax.process_count()}, jax {jax.__version__}',
            f'parameters   {parameters:,}',
            f'data         {len(train_set)} images to train, {len(val_set)} to evaluate, '
            f'{len(start.classes)} classes, {config.data}',
            f'objects      {objects.sum()}, at most {objects.max()} in an image; left out: {left_out}',
            f'sequences    {used} patches, {waste:.1%} padding',
            f'steps        {config.epochs} epochs of {batches.steps_per_epoch}, from step {first}',
        ]
    )


def compile_step(train_step, state, batch, log):
    """The training step compiled for this batch's shapes: once for each length of sequences."""
    clock = time.monotonic()
    program = train_step.lower(state, batch).compile()
    B, N, _ = batch['patches'].shape
    log.say(f'compiled for {B} sequences of {N} patches in {time.monotonic() - clock:.0f} s')
    log.start_clock()
    return program


def evaluate(predict, params, val_batches, mesh, step, log):
    """The AP on the validation split; all twelve numbers are logged."""
    results = evaluation.detect(predict, params, val_batches, mesh)
    ap = None
    if cluster.is_first():
        numbers, _ = evaluation.score(val_batches.records.json, results)
        log.say(evaluation.table(numbers))
        log.write(step, numbers)
        ap = numbers['AP']
    return cluster.from_first(ap)


def main():
    """Parse the flags and train."""
    config = CONFIG.value
    cli.keep_memory()
    cluster.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, HEARTBEAT.value)
    with run.folder(WORKDIR.value) as workdir:
        train(config, Path(workdir), STUCK.value)


if __name__ == '__main__':
    cli.run_with_flags(main)
