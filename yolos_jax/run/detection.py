"""Training of a detector: data, detector, batches, optimiser and steps, made once from a config."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from yolos_jax import class_matching, evaluation, files, optim, steps, visualize
from yolos_jax.configs import common
from yolos_jax.data import annotations, cache, geometry, records
from yolos_jax.data.batches import EvalBatches, TrainBatches, photograph
from yolos_jax.detections import Detections, best_first
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos
from yolos_jax.run import cluster, config_checks, config_files, detection_data, resumption, setup, workdir
from yolos_jax.run import mesh as meshes
from yolos_jax.run.log import Log
from yolos_jax.run.run_files import CARD
from yolos_jax.run.starting_point import frozen_blocks, make_start, model_fields
from yolos_jax.weights import checkpoint, model_card, sizes, step_ap
from yolos_jax.weights.pretrained import Pretrained

FEW_STEPS = 500  # of a run
SHOWN = 8  # images of an evaluation, in TensorBoard


@dataclasses.dataclass(frozen=True)
class DetectorSetup(setup.Setup):
    """The setup of a run that trains a detector."""

    start: Pretrained
    category_of: dict  # {label: category id in the validation split}
    truth: annotations.Annotations | None  # of the validation split, in process 0, which scores

    def describe(self) -> dict:
        """The meta of a checkpoint about the detector and its training."""
        train_set, val_set = self.batches.records, self.val_batches.records
        images = {
            'training_images': f'{len(train_set):,}, with {len(train_set.boxes):,} objects',
            'validation_images': f'{len(val_set):,}, with {len(val_set.boxes):,} objects',
            'training_split': train_set.source.split,
            'validation_split': val_set.source.split,
        }
        return checkpoint.describe(self.start) | {'training': self.computers() | images}

    def about_data(self) -> list[str]:
        """Lines for the summary; `tools.check_data` says more about the data."""
        train_set, (lengths, waste) = self.batches.records, self.batches.waste()
        val_set, objects = self.val_batches.records, np.diff(train_set.first)
        most = min(self.config.max_targets, self.start.model.num_det_tokens)
        beyond = np.maximum(objects - most, 0).sum()
        reasons = train_set.dropped | ({f'beyond {most} of an image': beyond} if beyond else {})
        dropped = ', '.join(f'{count} {reason}' for reason, count in reasons.items())
        return [
            f'data         {len(train_set)} images to train, {len(val_set)} to evaluate, '
            f'{len(self.start.classes)} classes, {train_set.source.path}',
            f'objects      {objects.sum()}, at most {objects.max()} in an image; left out: {dropped}',
            f'sequences    {" ".join(map(str, lengths))} patches, {waste:.1%} padding',
            f'[DET] tokens {self.start.model.num_det_tokens}',
            f'weights      {self.config.init_from or "from scratch (no init_from)"}',
        ]

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """The ids of images in the annotations."""
        return self.batches.records.ids[indices]

    def evaluate(self, state: dict, done: int, log: Log, on_batch: Callable[[], None], _: float) -> float:
        """Measure the AP on the validation split; all twelve numbers are logged."""
        outputs, val_set = self.detect(state, on_batch), self.val_batches.records
        if not cluster.is_first():
            return np.nan
        results = evaluation.to_results(outputs, val_set, self.category_of)
        numbers, _ = evaluation.score(self.truth, results)
        log.write(done, numbers | evaluation.mean_losses(outputs))
        log.print(evaluation.table(numbers))
        log.pictures(done, first_images(outputs, val_set, self.start.classes))
        return numbers['AP']

    def finish(self, folder: Path, aps: dict[int, float | None], meta: dict, _: Log) -> None:
        """Write the model card: of the best step, or the last if none was evaluated."""
        if not aps:
            return
        step = max(aps, key=lambda step: (step_ap.rank(aps[step]), step))
        about = self.start.about | meta | {'step': step}
        if aps[step] is not None:
            about['AP'] = aps[step]
        card = model_card.text(dataclasses.replace(self.start, about=about))
        files.write(folder / CARD, card.encode())


def first_images(outputs: dict, data: records.Records, names: dict[int, str]) -> list[np.ndarray]:
    """The first images of a split with their detections drawn; outputs: of `evaluation.detect`."""
    pictures = []
    for row, index in enumerate(outputs['index'][:SHOWN].tolist()):
        of_image = {name: outputs[name][row] for name in ('boxes', 'scores', 'labels')}
        try:
            image = photograph(data, index)
        except InputError:  # another process, with a copy of its own, could read it
            continue
        tokens = best_first(of_image['scores'], 0.5)
        detections = Detections.of_tokens(of_image, tokens, names, image.shape[:2], image=image)
        picture = detections.draw()
        picture.thumbnail((visualize.LONGEST, visualize.LONGEST))  # a JPEG's sides have bounds
        pictures.append(np.asarray(picture))
    return pictures


def prepare(config: ConfigDict, mesh: Mesh, work: workdir.Workdir) -> DetectorSetup:
    """The data, the detector to start from, the batches, the optimiser and the steps of a run."""
    if config_files.is_pretraining(config):
        raise InputError('this config is one for pre-training, not for training a detector')
    config, saved, notes = resumption.resumed(config, common.get_config(), work)
    folder = work.folder
    if not saved:
        check_used(config)
    check_values(config)
    config_checks.check_batch_size(config, mesh, config.images_per_group, 'images_per_group')
    train_set, val_set = detection_data.read(config, folder, resumes=bool(saved))
    digests = {'train': train_set.digests, 'val': val_set.digests}
    resumption.check_same_data(saved.get('data', {}), digests, folder)
    start = make_start(config, train_set, meshes.platform(mesh), saved, log=notes.append)
    batches = make_batches(config, train_set, start)
    if batches.cache and batches.cache.note:
        notes.append(f'data_cache: {batches.cache.note}')
    category_of, of_classes = class_matching.match(start, val_set)
    val_batches = EvalBatches(
        class_matching.relabelled(val_set, category_of),
        size=start.size,
        max_size=start.max_size,
        batch_size=config.batch_size,
        max_targets=config.max_targets,
    )
    notes += of_classes + detection_data.notes(train_set, val_set)
    if (total := config.epochs * batches.steps_per_epoch) < FEW_STEPS:
        notes.append(f'only {total} steps in all: more epochs or a larger learning_rate may be needed')
    model = checkpoint.describe(start)['model']
    setup.check_agreement(config, work, batches=batches, digests=digests, model=model)
    setup.write_config(config, work)
    rate = optim.learning_rate(config.learning_rate, config.epochs, batches.steps_per_epoch)
    optimizer, loss = make_optimizer(config, start, rate), make_loss(config, start)
    params = start.params if saved else cluster.from_first(start.params)
    state, train_step = setup.make_step(config, mesh, params, optimizer, loss)
    detection_data.write_truth(config, val_set, folder)
    return DetectorSetup(
        start=start,
        digests=digests,
        batches=batches,
        val_batches=val_batches,
        rate=rate,
        train_step=train_step,
        predict=meshes.make_predictor(steps.make_evaluation_step(start.model), mesh),
        state=state,
        config=config,
        mesh=mesh,
        threads=cluster.threads(),
        category_of=category_of,
        truth=val_set.truth() if cluster.is_first() else None,
        notes=notes,
    )


def check_values(config: ConfigDict) -> None:
    """Raises InputError if a number of the config is out of its range or not finite."""
    config_checks.check_numbers(config)
    values = config_files.flat(config)
    for name in ('augment.sizes', 'augment.crop_from'):
        if not all(16 <= size <= 10_000 for size in values[name]):
            raise InputError(f'{name} is {values[name]}, not sides between 16 and 10000', name)
    for name in ('augment.max_size', 'eval_size', 'eval_max_size'):
        if 0 < values[name] < 16:
            raise InputError(f'{name} is {values[name]}, less than a patch of 16 pixels', name)
    if not config.augment.crop_from or config.augment.crop_min > config.augment.crop_max:
        raise InputError(
            f'crops are of {config.augment.crop_min} to {config.augment.crop_max} pixels, from sides of '
            f'{config.augment.crop_from}',
            'augment.crop_min',
        )
    if config.model.width:
        if left := [f'model.{name}' for name in ('depth', 'heads') if not config.model[name]]:
            raise InputError(
                f'model.width is {config.model.width}, but {left[0]} 0; set both, or neither to take the '
                'model from init_from',
                'model.width',
            )
        sizes.check(Yolos(**model_fields(config)))


def check_used(config: ConfigDict) -> None:
    """Raises InputError if a key is set that has no effect with the other values."""
    splits, augment = ('train', 'val'), config.augment
    unused = {f'{split}_images': f'without {split}_json' for split in splits if not config[f'{split}_json']}
    unused |= {f'{split}_split': f'with {split}_json' for split in splits if config[f'{split}_json']}
    if config.val_fraction:
        unused |= dict.fromkeys(('val_split', 'val_json', 'val_images'), 'with val_fraction')
    if not augment.sizes:
        unused |= {f'augment.{name}': 'without augment.sizes' for name in augment if name != 'sizes'}
    values, defaults = config_files.flat(config), config_files.flat(common.get_config())
    for name, needs in unused.items():
        if values[name] != defaults[name]:
            raise InputError(f'{name} is {values[name]}, which has no effect {needs}', name)


def make_optimizer(config: ConfigDict, start: Pretrained, rate: Callable) -> optax.GradientTransformation:
    """The optimiser of a run; rate: step -> learning rate."""
    return optim.make_optimizer(
        start.params,
        rate,
        config.weight_decay,
        config.clip_norm,
        frozen_blocks=frozen_blocks(config, start.model),
        fresh_factor=fresh_factor(config),
    )


def make_loss(config: ConfigDict, start: Pretrained) -> Callable:
    """The loss of a run, with zero gradients for frozen parameters."""
    loss = steps.make_loss(start.model, config.images_per_group)
    if frozen := frozen_blocks(config, start.model):
        return optim.with_frozen(loss, optim.trainable(start.params, frozen))
    return loss


def fresh_factor(config: ConfigDict) -> float:
    """The learning rate of heads and [DET] tokens as a multiple of the general one."""
    if not config.fresh_learning_rate:
        return 1.0
    if not config.learning_rate:
        raise InputError('fresh_learning_rate is a multiple of learning_rate, which is 0', 'learning_rate')
    return config.fresh_learning_rate / config.learning_rate


def make_batches(config: ConfigDict, train_set: records.Records, start: Pretrained) -> TrainBatches:
    """The run's batches, with bucket lengths chosen from the sizes of the data, and their cache."""
    config_checks.check_enough(len(train_set), train_set.source.path, config)
    if not len(train_set.boxes):
        notes = ''.join(f'; {note}' for note in train_set.notes)
        raise InputError(
            f'{train_set.source.path}: {train_set.why_no_objects} in {config.train_split}{notes}'
        )
    batches = TrainBatches.make(
        train_set,
        geometry.Recipe.from_fields(config.augment, start.size, start.max_size),
        num_lengths=config.num_lengths,
        batch_size=config.batch_size,
        max_targets=config.max_targets,
        seed=config.seed,
        special=start.model.special,
    )
    if config.data_cache:
        batches.cache = cache.DecodedImages(config.data_cache, train_set.heights, train_set.widths)
    return batches
