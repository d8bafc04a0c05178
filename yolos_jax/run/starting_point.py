"""The detector that a run starts from: from scratch, or pretrained."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from yolos_jax import attention, weights
from yolos_jax.configs import common
from yolos_jax.data import records
from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, init_params, param_shapes
from yolos_jax.weights import adapt, checkpoint
from yolos_jax.weights.pretrained import Pretrained, about_ids

COMPUTED = 'dtype', 'remat'  # how a model is computed, whatever its weights are


def make_start(
    config: ConfigDict,
    train_set: records.Records,
    platform: str,
    saved: dict | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Pretrained:
    """The detector a run starts from: a new one, or with the weights of `init_from`.

    saved: the meta of a checkpoint that will be restored; then the result is its model with zeros as
        parameters, and `init_from` is not read again. log: receives lines about the weights.
    """
    dtype = jnp.dtype(config.model.dtype)
    kernel = attention.for_platform(platform, dtype)
    compute = {'dtype': dtype, 'remat': config.model.remat, 'attention_kernel': kernel}
    model = Yolos(**model_fields(config) | compute, num_classes=train_set.num_classes)
    if saved:
        start = restored(saved, train_set)
    elif config.init_from:
        start = from_weights(config, model, train_set, log)
    else:
        start = from_scratch(config, model, train_set)
    ids, about = train_set.category_ids, start.about
    if any(label != number for label, number in ids.items()):
        about = about | about_ids(ids)
    return dataclasses.replace(
        start,
        model=start.model.clone(**compute),
        params=jax.device_get(start.params),  # only the state stays on devices, where it may be sharded
        classes=train_set.classes,
        about=about,
    )


def restored(saved: dict, train_set: records.Records) -> Pretrained:
    """The detector of a checkpoint that will be restored: its parameters are zeros."""
    model = checkpoint.model_of(saved['model'])
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), param_shapes(model))
    return Pretrained(model, params, train_set.classes, *saved['eval_size'], saved['about'])


def from_scratch(config: ConfigDict, model: Yolos, train_set: records.Records) -> Pretrained:
    """A new detector; raises InputError if the config takes a value from weights."""
    check_model_is_given(config)
    if frozen_blocks(config, model):
        raise InputError(f'freeze is {config.freeze}, but there are no weights to freeze', 'init_from')
    if not config.eval_size or not config.eval_max_size or not config.augment.sizes:
        raise InputError(
            'eval_size and augment.sizes are left to the weights, but none are given', 'init_from'
        )
    params = init_params(model, jax.random.key(config.seed))
    return Pretrained(model, params, train_set.classes, config.eval_size, config.eval_max_size)


def from_weights(
    config: ConfigDict, model: Yolos, train_set: records.Records, log: Callable[[str], None]
) -> Pretrained:
    """The detector in `init_from`, or `model` with the backbone in it; log: as for `make_start`."""
    size, max_size = config.eval_size, config.eval_max_size
    with weights.open(config.init_from) as source:
        if source.is_detector:
            try:
                pretrained = source.detector(log=log)
            except InputError as error:
                if error.argument not in weights.HINTS:
                    raise
                raise InputError(f'{error} to `yolos convert`, and use its output as init_from') from None
            pretrained = start_from_detector(config, pretrained, train_set, log)
            size, max_size = size or pretrained.size, max_size or pretrained.max_size
            model, params = pretrained.model, pretrained.params
        else:
            check_model_is_given(config)
            if frozen_blocks(config, model) == model.depth:
                raise InputError(
                    f'freeze is {config.freeze}, but {config.init_from} has no [DET] tokens, so they have '
                    f'to be trained; {model.depth - 1} trains them and the last block',
                    'freeze',
                )
            params = source.backbone(model, jax.random.key(config.seed), log)
        if not size or not max_size:
            raise InputError('eval_size is left to a detector, but init_from is a backbone', 'init_from')
        return Pretrained(model, params, train_set.classes, size, max_size, source.about)


def start_from_detector(
    config: ConfigDict, pretrained: Pretrained, train_set: records.Records, log: Callable[[str], None]
) -> Pretrained:
    """A detector with the classes of the training set; raises InputError if the config asks for another."""
    if config.reset_classes:
        pretrained, report = adapt.with_classes(
            pretrained, train_set.classes, config.seed, seen=set(train_set.labels.tolist())
        )
        log(report)
    adapt.check_classes(pretrained, train_set.classes, train_set.source.path, argument='reset_classes')
    untouched = common.get_config().model
    for name, asked in model_fields(config).items():
        actual = getattr(pretrained.model, name)
        is_left_out = name in COMPUTED or not config.model.width and asked == untouched[name]
        if not is_left_out and asked != actual:
            raise InputError(
                f'model.{name} is {asked}, but {actual} in {config.init_from}; the finetune config takes '
                'the model from the weights',
                f'model.{name}',
            )
    return pretrained


def check_model_is_given(config: ConfigDict) -> None:
    """Raises InputError if the config leaves the model to init_from, and no detector is there."""
    if not config.model.width:
        raise InputError(
            f'init_from is {config.init_from!r}, but model.width is 0: name a detector, or set the model',
            'init_from',
        )


def frozen_blocks(config: ConfigDict, model: Yolos) -> int:
    """How many blocks of the backbone are not trained; raises InputError for an invalid `freeze`."""
    if config.freeze in ('', 'backbone'):
        return model.depth if config.freeze else 0
    if config.freeze.isdecimal() and int(config.freeze) <= model.depth:
        return int(config.freeze)
    raise InputError(
        f"freeze is {config.freeze!r}, neither 'backbone' nor a number of its {model.depth} blocks",
        'freeze',
    )


def model_fields(config: ConfigDict) -> dict:
    """The fields of a `Yolos` that a config gives."""
    return {name: value for name, value in config.model.items() if name != 'eps' or value}
