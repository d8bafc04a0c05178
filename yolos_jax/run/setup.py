"""The setup of a run: what `detection` and `pretraining` have in common."""

import abc
import dataclasses
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

from yolos_jax import evaluation, files, steps
from yolos_jax.run import cluster, config_files, run_files, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.log import Log
from yolos_jax.run.resumption import versions


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
        return {'hardware': f'{hardware}, {jax.process_count()} processes', 'software': versions()}

    def detect(self, state: dict, on_batch: Callable[[], None]) -> dict:
        """The outputs of `predict` for the validation split, by `evaluation.detect`."""
        return evaluation.detect(
            functools.partial(self.predict, steps.eval_params(state)),
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


def check_agreement(
    config: ConfigDict, work: workdir.Workdir, *, batches: Any, digests: dict, model: dict
) -> None:
    """Raises InputError if the processes of a run differ in config, workdir, plan, data, model or software.

    digests: of the data of each split, by its name. model: its fields, which may come from the weights.
    """
    cluster.barrier('workdir')
    plan = batches.plan(0)
    of_plan = [hashlib.sha256(x.tobytes()).hexdigest() for x in (plan.indices, plan.lengths)]
    facts = config_files.flat(config) | {'the workdir': workdir.owner(work), 'the plan of batches': of_plan}
    facts |= {f'the {name} data': digest for name, digest in digests.items()}
    cluster.agree(facts | {'the model': model} | cluster.facts_of_code())


def write_config(config: ConfigDict, work: workdir.Workdir) -> None:
    """Write FOLDER/config.json, by which a folder is known as a run's: before any other file of it."""
    if cluster.is_first():
        files.write_json(work.folder / run_files.CONFIG, config_files.flat(config))


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
        layout = jax.tree.map(lambda _: meshes.replicated(mesh), shapes)
    layout = meshes.in_memory(shapes, layout)
    state = jax.jit(init, out_shardings=layout)(params, fixed=fixed)
    step = steps.make_update(loss, optimizer, config.accumulate_steps, config.ema)
    return state, jax.jit(step, donate_argnums=0, out_shardings=(layout, meshes.replicated(mesh)))
