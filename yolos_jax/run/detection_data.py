"""The training and the validation set of a run that trains a detector."""

import os
from pathlib import Path

from ml_collections import ConfigDict

from yolos_jax import evaluation, files
from yolos_jax.configs import common
from yolos_jax.data import annotations, overlap, records, sources
from yolos_jax.errors import InputError, shown
from yolos_jax.run import cluster
from yolos_jax.run.run_files import TRUTH

FEW_IMAGES = 10  # to evaluate on


def read(config: ConfigDict, folder: Path, *, resumes: bool) -> tuple[records.Records, records.Records]:
    """The training and validation sets; their indices are kept in the folder.

    resumes: keep the validation images of the earlier start.
    """

    def of_split(name: str) -> records.Records:
        index = folder / 'index' / f'{config[f"{name}_split"]}.npz'
        return records.from_source(source_of(config, name), index, config.bad_images)

    train_set = of_split('train')
    if not config.val_fraction:
        return train_set, of_split('val')
    if not resumes or not (folder / TRUTH).exists():
        return records.split_by_fraction(train_set, config.val_fraction, config.seed)
    try:
        validation = annotations.read(folder / TRUTH).ids
    except InputError as error:
        raise InputError(f'{error}; if you delete that file, the same split is drawn again') from None
    return records.split_by_ids(train_set, validation)


def write_truth(config: ConfigDict, val_set: records.Records, folder: Path) -> None:
    """Write FOLDER/val.json for a validation set without an annotation file of its own."""
    if (config.val_fraction or not val_set.source.truth) and cluster.is_first():
        beside = config.train_json and (os.path.dirname(config.train_json) or '.')
        root = (config.train_images or beside or config.data) if config.val_fraction else config.data
        truth = val_set.truth_in(Path(root).parent if Path(root).is_file() else root)  # data.yaml
        files.write_json(folder / TRUTH, evaluation.coco_content(truth, upright=val_set.images.upright))


def source_of(config: ConfigDict, name: str) -> sources.Source:
    """The source of a split ('train' or 'val'); raises InputError if the config names none."""
    if file := config[f'{name}_json']:
        return sources.of_files(file, config[f'{name}_images'], argument=f'{name}_images')
    if not config.data:
        raise InputError('no data: name a folder', 'data')
    try:
        return sources.find(config.data, config[f'{name}_split'])
    except InputError as error:
        if error.argument != 'split':
            raise
        if name == 'val' and config.val_split == common.get_config().val_split:
            advice = 'a part of the other images, such as 0.1, can be used'
            raise InputError(f'{error}; {advice}', 'val_fraction') from None
        raise InputError(str(error), f'{name}_split') from None


def notes(train_set: records.Records, val_set: records.Records) -> list[str]:
    """Notes on the data for the user, a line each; only process 0 compares the two sets."""
    lines, seen = [], set(train_set.labels.tolist())
    train_split, val_split = train_set.source.split, val_set.source.split
    if val_set.source is train_set.source:
        val_split = f'the part of {train_split} to validate on'
    if unseen := [name for label, name in train_set.classes.items() if label not in seen]:
        lines.append(f'{train_split}: classes without an object: {shown(unseen)}')
    lines += [f'{train_split}: {note}' for note in train_set.notes]
    lines += [f'{val_split}: {note}' for note in val_set.notes]
    if not len(val_set.boxes):
        lines.append(f'{val_split}: {val_set.why_no_objects}, so there will be no AP')
    elif len(val_set) < FEW_IMAGES:
        lines.append(f'{val_split}: only {len(val_set)} images, so the AP is rough')
    return lines + (overlap.notes(train_set, val_set) if cluster.is_first() else [])
