"""Checks of a run's config: its keys, their types and ranges, and the size of its batches."""

import difflib
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from yolos_jax import file_names
from yolos_jax.errors import InputError
from yolos_jax.run import config_files
from yolos_jax.run import mesh as meshes

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


def check_types(config: ConfigDict, known: ConfigDict) -> None:
    """Raises InputError if a value is of another type than in `known`, as `ConfigDict(dict)` allows."""
    values = config_files.flat(config)
    for name, default in config_files.flat(known).items():
        value, kinds = values[name], (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, list) and not all(type(x) is int for x in value):
            raise InputError(f'{name} is {value!r}, not all whole numbers', name)
        if default is None or value is None and name == 'model.pos_grid':  # of a model without a table
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise InputError(
                f'{name} is {value!r}, of type {type(value).__name__} and not {type(default).__name__}',
                name,
            )


def check_text(config: ConfigDict) -> None:
    """Raises InputError if a value, such as a path, is not UTF-8: checkpoints keep it."""
    for name, value in config_files.flat(config).items():
        if isinstance(value, str) and not file_names.is_utf8(value):
            raise InputError(f'{name} is {value!r}, which is not UTF-8; rename that folder or file', name)


def check_keys(config: ConfigDict, known: ConfigDict) -> None:
    """Raises InputError if a config has a key that nothing reads."""
    names, expected = config_files.flat(config).keys(), config_files.flat(known).keys()
    for name in sorted(names - expected):
        like = difflib.get_close_matches(name, expected, 1)
        raise InputError(f'no such key: {name}' + (f'; did you mean {like[0]}?' if like else ''), name)


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError if a number of the config is out of its range or not finite."""
    values = config_files.flat(config)
    for name, (least, greatest) in RANGES.items():
        if values.get(name) is None:
            continue
        if type(values[name]) not in (int, float):  # of a key whose default is None
            raise InputError(f'{name} is {values[name]!r}, no number', name)
        if not least <= values[name] <= greatest:  # NaN is in no range
            raise InputError(f'{name} is {values[name]}, not between {least:g} and {greatest:g}', name)
    if config.model.dtype not in ('float32', 'bfloat16'):
        raise InputError(f'model.dtype is {config.model.dtype}, not float32 or bfloat16', 'model.dtype')


def check_batch_size(config: ConfigDict, mesh: Mesh, group: int, argument: str) -> None:
    """Raises InputError if the batch does not divide over devices, parts and groups of images.

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
    """Raises InputError if there are fewer images than one batch has."""
    if count < config.batch_size:
        raise InputError(
            f'{path}: {count} images are less than one batch of {config.batch_size}', 'batch_size'
        )
