"""Pre-training of a ViT as DeiT: data, classifier, batches, optimiser and steps, made from a config."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from yolos_jax import attention, classification, optim, steps
from yolos_jax.classifier import Classifier, init_params
from yolos_jax.configs import deit_ti
from yolos_jax.data import augmentation, class_batches, labelled
from yolos_jax.errors import InputError
from yolos_jax.patches import PATCH
from yolos_jax.run import cluster, config_checks, config_files, resumption, setup, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.log import Log
from yolos_jax.run.stop import StopSignal
from yolos_jax.run.teacher import make_teacher, other_classes, read_classifier, resized
from yolos_jax.run.train import Step, check_arguments, run_to_end
from yolos_jax.weights import deit


@dataclasses.dataclass(frozen=True)
class PretrainingSetup(setup.Setup):
    """The setup of a run that pre-trains a ViT."""

    model: Classifier

    def describe(self) -> dict:
        """The meta of a checkpoint about the classifier and its training."""
        fields = ('width', 'depth', 'heads', 'num_classes', 'size', 'distilled', 'eps')
        classifier = {name: getattr(self.model, name) for name in fields}
        return {
            'classifier': classifier,
            'classes': self.batches.records.classes,
            'training': self.computers(),
        }

    def about_data(self) -> list[str]:
        """Lines for the summary."""
        train_set, val_set, recipe = self.batches.records, self.val_batches.records, self.config.augment
        return [
            f'data         {len(train_set)} images to train, {len(val_set)} to evaluate, '
            f'{len(train_set.classes)} classes, {train_set.path}',
            f'epoch        {len(train_set) // recipe.repeats} images, {recipe.repeats} of each in a batch',
        ]

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of images in the order of their names."""
        return indices

    def evaluate(
        self, state: dict, done: int, log: Log, on_batch: Callable[[], None], best: float
    ) -> float:
        """Measure the top-1 accuracy on the validation split; the best weights so far go to deit.pth."""
        outputs, params = self.detect(state, on_batch), cluster.fetch(steps.eval_params(state))
        if not cluster.is_first():
            return np.nan
        images = len(self.val_batches.records)  # one that cannot be read counts as wrong
        numbers = {name: float(outputs[name].sum()) / images for name in ('top1', 'top5')}
        numbers['val_loss'] = float(outputs['val_loss'].mean())
        log.write(done, numbers)
        file = log.folder / deit.FILE
        if numbers['top1'] >= best or not file.exists():
            about = {'step': done, 'top1': numbers['top1'], 'classes': self.batches.records.classes}
            deit.write(params, self.model, file, about)
        return numbers['top1']

    def finish(self, folder: Path, _: dict, __: dict, log: Log) -> None:
        """Log which weights deit.pth holds."""
        best = deit.about(folder / deit.FILE)
        if 'top1' in best:
            log.print(f'{deit.FILE}: the weights of step {best["step"]}, top-1 {best["top1"]:.4f}')


def pretrain(
    config: ConfigDict,
    workdir: str | Path,
    mesh: Mesh | None = None,
    on_step: Callable[[Step], bool | None] | None = None,
    *,
    stuck: int | None = None,
    stop: StopSignal | None = None,
) -> int | None:
    """Pre-train as a config says (`configs.deit_ti` describes its values); all else is as for `train`."""
    mesh = check_arguments(config, workdir, mesh)
    return run_to_end(functools.partial(prepare, config, mesh), workdir, on_step, stuck=stuck, stop=stop)


def prepare(config: ConfigDict, mesh: Mesh, work: workdir.Workdir) -> PretrainingSetup:
    """The data, the classifier, the batches, the optimiser and the steps of a run."""
    if not config_files.is_pretraining(config):
        raise InputError('this config is one for training a detector, not for pre-training')
    config, saved, notes = resumption.resumed(config, deit_ti.get_config(), work)
    check_values(config)
    group = group_size(config)
    config_checks.check_batch_size(config, mesh, group, 'augment.mix_group')
    train_set, val_set = read_data(config)
    config_checks.check_enough(len(train_set), train_set.path, config)
    model = make_model(config, len(train_set.classes), meshes.platform(mesh))
    teacher = make_teacher(config, model, train_set, group)
    notes += teacher.notes
    batches = make_batches(config, train_set, group, teacher.labels)
    digests = {'train': train_set.digests | {'teacher': teacher.digest}, 'val': val_set.digests}
    resumption.check_same_data(saved.get('data', {}), digests, work.folder)
    setup.check_agreement(config, work, batches=batches, digests=digests, model=dict(config.model))
    setup.write_config(config, work)
    params = jax.device_get(init_params(model, jax.random.key(config.seed), xavier=config.xavier_init))
    if config.init_from and not saved:
        params, report = start_params(config.init_from, model, params, train_set.classes)
        notes += report
    if config.epochs <= config.warmup_epochs:
        notes.append(f'warmup_epochs is {config.warmup_epochs}, so all {config.epochs} epochs are warm-up')
    final = optim.COSINE_END if config.final_learning_rate is None else config.final_learning_rate
    schedule = config.epochs, config.warmup_epochs, batches.steps_per_epoch
    rate = optim.warmup_cosine(config.learning_rate, *schedule, final=final)
    optimizer = optim.make_deit_optimizer(params, rate, config.weight_decay)
    loss = classification.make_loss(
        model, smoothing=config.smoothing, drop_path=config.drop_path, group=group, teach=teacher.teach
    )
    params = params if saved else cluster.from_first(params)
    state, train_step = setup.make_step(config, mesh, params, optimizer, loss, teacher.params)
    return PretrainingSetup(
        batches=batches,
        val_batches=class_batches.EvalBatches(val_set, model.size, config.batch_size),
        rate=rate,
        train_step=train_step,
        predict=meshes.make_predictor(classification.make_evaluation_step(model), mesh),
        state=state,
        config=config,
        mesh=mesh,
        threads=cluster.threads(),
        notes=notes,
        model=model,
        digests=digests,
    )


def check_values(config: ConfigDict) -> None:
    """Raises InputError if the config cannot be used."""
    config_checks.check_numbers(config)
    if not config.data:
        raise InputError('no data: name a folder', 'data')
    if config.model.size % PATCH:
        raise InputError(f'model.size is {config.model.size}, not a multiple of {PATCH}', 'model.size')
    for name in ('width', 'depth', 'heads'):
        if config.model[name] < 1:
            raise InputError(f'model.{name} is {config.model[name]}, less than 1', f'model.{name}')
    if config.model.width % config.model.heads:
        raise InputError(
            f'model.width is {config.model.width}, not a multiple of model.heads, {config.model.heads}',
            'model.heads',
        )


def group_size(config: ConfigDict) -> int:
    """How many consecutive images are mixed alike; each part of an accumulated batch has whole groups."""
    if not config.augment.mixup and not config.augment.cutmix:
        return 1
    return config.augment.mix_group or config.batch_size


def read_data(config: ConfigDict) -> tuple[labelled.LabelledImages, labelled.LabelledImages]:
    """The training and validation sets; the classes are those of the first."""

    def read(name: str, classes: list[str] | None = None) -> labelled.LabelledImages:
        try:
            images = labelled.read(config.data, config[name], classes)
        except InputError as error:
            raise InputError(str(error), name if error.argument == 'split' else error.argument) from None
        most = images.bad_images if config.bad_images is None else config.bad_images
        return dataclasses.replace(images, bad_images=most)

    train_set = read('train_split')
    return train_set, read('val_split', train_set.classes)


def make_model(config: ConfigDict, num_classes: int, platform: str) -> Classifier:
    """The classifier of a config."""
    dtype = jnp.dtype(config.model.dtype)
    return Classifier(
        **dict(config.model) | {'dtype': dtype},
        num_classes=num_classes,
        distilled=bool(config.teacher),
        attention_kernel=attention.for_platform(platform, dtype),
    )


def make_batches(
    config: ConfigDict, train_set: labelled.LabelledImages, group: int, teacher: np.ndarray | None
) -> class_batches.TrainBatches:
    """The run's batches; teacher: as for `class_batches.TrainBatches`."""
    names = ('repeats', 'erasing', 'mixup', 'cutmix')
    recipe = augmentation.Recipe(
        size=config.model.size, group=group, **{name: config.augment[name] for name in names}
    )
    options = dict(batch_size=config.batch_size, seed=config.seed, teacher=teacher)
    return class_batches.TrainBatches(train_set, recipe, **options)


def start_params(
    location: str, model: Classifier, fresh: dict, classes: list[str]
) -> tuple[dict, list[str]]:
    """The parameters of a classifier to start from, and notes for the user.

    As DeiT's main.py --finetune: its positions are resampled to the model's size, and heads for other
    classes are fresh.

    Raises:
        InputError: it is not a classifier, or has another shape.
    """
    saved = read_classifier(location, 'init_from')
    classifier, params = saved.model, saved.params
    for name in ('width', 'depth', 'heads', 'distilled'):
        if (value := getattr(classifier, name)) != (asked := getattr(model, name)):
            raise InputError(f'{location}: a classifier with {name} {value}, not {asked}', 'init_from')
    notes = [f'starts from {location}']
    if difference := other_classes(saved, classes):
        params = fresh | {'backbone': params['backbone']}
        notes.append(f'{difference}: the heads start fresh')
    return resized(params, classifier.side, model.side), notes
