"""The setup of a run: what `detection` and `pretraining` have in common, and checks of the config."""

import abc
import dataclasses
import difflib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import yolos_jax
from yolos_jax import evaluation, files, steps
from yolos_jax.errors import InputError
from yolos_jax.run import cluster, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.progress import Log
from yolos_jax.weights import checkpoint


@dataclasses.dataclass(frozen=True)
class Setup(abc.ABC):
    """All that the training loop needs, made once from the config of a run."""

    batches: Any  # `loader.Batches`, with steps_per_epoch and plan(epoch).lengths
    val_batches: Any
    rate: Callable  # step -> learning rate
    train_step: Callable
    predict: Callable  # of a batch of the validation split, numpy in and out
    state: dict
    digests: dict  # of the data: equal for equal data
    config: ConfigDict
    mesh: Mesh
    threads: int  # of this process, for loading
    notes: list[str]

    @property
    def total(self) -> int:
        """How many steps the run has."""
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def rows(self) -> slice:
        """The rows of a batch that this process loads."""
        return meshes.rows_of_process(self.config.batch_size, self.mesh)

    def lengths_from(self, step: int) -> np.ndarray:
        """The sequence lengths of a step and of the rest of its epoch."""
        epoch, done = divmod(step, self.batches.steps_per_epoch)
        return self.batches.plan(epoch).lengths[done:]

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps."""
        epoch, left = divmod(done, self.batches.steps_per_epoch)
        return done > 0 and left == 0 and (epoch % self.config.eval_every == 0 or done == self.total)

    def computers(self) -> dict[str, str]:
        """The hardware and software of the run, for a model card."""
        hardware = f'{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}'
        return {
            'hardware': f'{hardware}, {jax.process_count()} processes',
            'software': f'yolos_jax {yolos_jax.__version__}, jax {jax.__version__}',
        }

    def detect(self, state: dict, on_batch: Callable[[], None]) -> dict:
        """The outputs of `predict` for the validation split, by `evaluation.detect`."""
        return evaluation.detect(
            functools.partial(self.predict, steps.evaluated(state)),
            self.val_batches,
            rows=self.rows,
            gather=cluster.gather,
            on_batch=on_batch,
            threads=self.threads,
        )

    def summary(self, first: int) -> str:
        """A summary for the user of the run from step `first` on."""
        kind, epochs = self.mesh.devices.flat[0].device_kind, self.config.epochs
        count = sum(x.size for x in jax.tree.leaves(self.state['params']))
        return '\n'.join(
            [
                f'devices      {self.mesh.size} x {kind}, processes {jax.process_count()}, '
                f'threads {self.threads}, jax {jax.__version__}',
                f'parameters   {count:,}',
                *self.about_data(),
                f'steps        {epochs} epochs of {self.batches.steps_per_epoch}, from step {first}',
                *(f'note         {note}' for note in self.notes),
            ]
        )

    @abc.abstractmethod
    def about_data(self) -> list[str]:
        """Lines for the summary."""

    @abc.abstractmethod
    def describe(self) -> dict:
        """The meta of a checkpoint about model and training, beside config and data."""

    @abc.abstractmethod
    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """The ids by which a user knows the images of a batch."""

    @abc.abstractmethod
    def evaluate(
        self, state: dict, done: int, log: Log, on_batch: Callable[[], None], best: float
    ) -> float:
        """Evaluate the state after `done` steps on the validation split, and log the result.

        on_batch: called after each batch. best: the best AP of the run so far, -inf before the first.
        Returns the AP, or top-1 in pre-training; only process 0's value, and its `best`, are used.
        """

    @abc.abstractmethod
    def finish(self, folder: Path, aps: dict[int, float | None], meta: dict, log: Log) -> None:
        """Write the run's last files. aps: of the steps saved. meta: of its checkpoints."""


RANGES = {  # of the numbers of a config: the least and the greatest
    'learning_rate': (0, 1),
    'fresh_learning_rate': (0, 1),
    'final_learning_rate': (0, 1),
    'bad_images': (0, 10**9),
    'weight_decay': (0, 1),
    'clip_norm': (1e-9, 1e9),
    'epochs': (0, 1_000_000),
    'warmup_epochs': (0, 1_000_000),
    'seed': (0, 2**63 - 1),
    'batch_size': (1, 1_000_000),
    'images_per_group': (1, 1_000_000),
    'accumulate_steps': (1, 1_000_000),
    'num_lengths': (1, 64),
    'max_targets': (1, 10_000),
    'eval_size': (0, 10_000),  # 0: that of the weights, as for augment.sizes
    'eval_max_size': (0, 100_000),
    'log_every': (1, 10**12),
    'save_every': (0, 10**12),  # 0: only after an evaluation
    'eval_every': (1, 10**12),
    'spike_factor': (0, 1e9),
    'val_fraction': (0, 0.9),
    'ema': (0, 0.999999),
    'patience': (0, 1_000_000),
    'augment.max_size': (0, 100_000),
    'augment.crop_min': (16, 10_000),
    'augment.crop_max': (16, 10_000),
    'model.size': (16, 2048),
    'model.remat': (0, 1000),
    'augment.repeats': (1, 100),
    'augment.mix_group': (0, 1_000_000),
    'augment.mixup': (0, 100),
    'augment.cutmix': (0, 100),
    'augment.erasing': (0, 1),
    'smoothing': (0, 0.99),
    'drop_path': (0, 0.9),
}


def resumed(config: ConfigDict, known: ConfigDict, work: workdir.Workdir) -> tuple:
    """The completed config, the meta of the run in the folder ({} for a new run), and notes.

    known: a config with all keys.

    Raises:
        InputError: the saved run has another config, the config of a new run has an unknown key, a value
            is not UTF-8, or a new run would write over other files.
    """
    config = completed(config, known)
    check_types(config, known)
    check_text(config)
    saved = checkpoint.newest_meta(work.folder / checkpoint.FOLDER)
    if saved:
        notes = workdir.check_same(saved['config'], workdir.flat(config), work.folder)
        began = saved['config'].get('init_from', config.init_from)  # for the model card
        if bool(began) != bool(config.init_from):
            notes.append(f'init_from stays {began!r}: a run resumes from its own weights')
            with config.unlocked():
                config.init_from = began
        return config, saved, notes
    check_keys(config, known)  # new runs only: a saved run of an earlier version may have other keys
    workdir.check_new(work.folder)
    return config, {}, []


def check_types(config: ConfigDict, known: ConfigDict) -> None:
    """Raises InputError where a value is of another type than in `known`, as `ConfigDict(dict)` allows."""
    values = workdir.flat(config)
    for name, default in workdir.flat(known).items():
        value, kinds = values[name], (int, float) if isinstance(default, float) else type(default)
        if default is None or value is None and name == 'model.pos_grid':  # of a model without a table
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise InputError(
                f'{name} is {value!r}, of type {type(value).__name__} and not {type(default).__name__}',
                name,
            )


def check_text(config: ConfigDict) -> None:
    """Raises InputError where a value, such as a path, is not UTF-8: checkpoints keep it."""
    for name, value in workdir.flat(config).items():
        if isinstance(value, str) and not files.is_utf8(value):
            raise InputError(f'{name} is {value!r}, which is not UTF-8; rename that folder or file', name)


def check_keys(config: ConfigDict, known: ConfigDict) -> None:
    """Raises InputError where a config has a key that nothing reads."""
    names, expected = workdir.flat(config).keys(), workdir.flat(known).keys()
    for name in sorted(names - expected):
        like = difflib.get_close_matches(name, expected, 1)
        raise InputError(f'no such key: {name}' + (f'; did you mean {like[0]}?' if like else ''), name)


def completed(config: ConfigDict, known: ConfigDict) -> ConfigDict:
    """A config with the default values of `known` for keys that are newer than the config."""
    result = known.copy_and_resolve_references()
    with result.unlocked(), result.ignore_type():
        result.update(config.copy_and_resolve_references())
    return result


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError where a number of the config is out of its range or not finite."""
    values = workdir.flat(config)
    for name, (least, greatest) in RANGES.items():
        if values.get(name) is None:
            continue
        if not least <= values[name] <= greatest:  # NaN is in no range
            raise InputError(f'{name} is {values[name]}, not between {least:g} and {greatest:g}', name)
    if config.model.dtype not in ('float32', 'bfloat16'):
        raise InputError(f'model.dtype is {config.model.dtype}, not float32 or bfloat16', 'model.dtype')


def check_batch_size(config: ConfigDict, mesh: Mesh, group: int, argument: str) -> None:
    """Raises InputError where the batch does not divide over devices, parts and groups of images.

    argument: the key of the config that `group` is from.
    """
    meshes.check_divides(config.batch_size, mesh)
    if config.batch_size % group:
        raise InputError(
            f'{argument} is {group}, which does not divide batch_size, {config.batch_size}', argument
        )
    rows, parts = config.batch_size // mesh.size, config.accumulate_steps
    if parts > 1 and rows % (parts * group):
        raise InputError(
            f"accumulate_steps is {parts}: a device's {rows} images do not divide into so many parts of "
            f'whole groups of {argument}, {group}',
            'accumulate_steps',
        )


def check_enough(count: int, path: Any, config: ConfigDict) -> None:
    """Raises InputError where there are fewer images than one batch has."""
    if count < config.batch_size:
        raise InputError(
            f'{path}: {count} images are less than one batch of {config.batch_size}', 'batch_size'
        )


def check_agreement(config: ConfigDict, work: workdir.Workdir, batches: Any, digests: dict) -> None:
    """Raises InputError if the processes of a run differ in config, workdir, plan, data or JAX.

    digests: of the data of each split, by its name.
    """
    cluster.wait('workdir')
    plan = batches.plan(0)
    of_plan = [hashlib.sha256(x.tobytes()).hexdigest() for x in (plan.indices, plan.lengths)]
    facts = workdir.flat(config) | {'the workdir': workdir.owner(work), 'the plan of batches': of_plan}
    facts |= {f'the {name} data': digest for name, digest in digests.items()}
    cluster.agree(facts | {'the version of jax': jax.__version__})


def make_step(
    config: ConfigDict,
    mesh: Mesh,
    params: dict,
    optimizer: optax.GradientTransformation,
    loss: Callable,
    fixed: dict | None = None,
) -> tuple[dict, Callable]:
    """The initial state, replicated or sharded over the devices, and the jitted training step.

    loss: as for `steps.make_update`. fixed: as for `steps.init_state`.
    """
    init = functools.partial(steps.init_state, optimizer=optimizer, ema=config.ema > 0)
    shapes = jax.eval_shape(init, params, fixed=fixed)
    if config.shard_params:
        layout = meshes.largest_axis(shapes, mesh)
    else:
        layout = jax.tree.map(lambda _: meshes.whole(mesh), shapes)
    layout = meshes.in_memory(shapes, layout)
    state = jax.jit(init, out_shardings=layout)(params, fixed=fixed)
    step = steps.make_update(loss, optimizer, config.accumulate_steps, config.ema)
    return state, jax.jit(step, donate_argnums=0, out_shardings=(layout, meshes.whole(mesh)))
