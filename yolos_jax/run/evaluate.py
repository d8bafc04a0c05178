"""Evaluates a detector on all devices: COCO's numbers, and the AP under corruptions of the images."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from yolos_jax import attention, class_matching, evaluation, steps, weights
from yolos_jax.analysis import outcomes, precision
from yolos_jax.data import annotations, corruptions, records
from yolos_jax.data.batches import EvalBatches
from yolos_jax.errors import InputError
from yolos_jax.inference import DTYPES, Detector
from yolos_jax.progress_bar import progress_bar
from yolos_jax.run import cluster
from yolos_jax.run import mesh as meshes


def batch_size_on(mesh: Mesh, given: int | None) -> int:
    """The number of images per step: the given one, or one per device; raises as `mesh.check_divides`."""
    batch_size = mesh.size if given is None else given
    meshes.check_divides(batch_size, mesh)
    return batch_size


def make_detect(
    pretrained: weights.Pretrained, mesh: Mesh, *, dtype: str, batch_size: int
) -> Callable[..., dict]:
    """A function of `EvalBatches` that returns the detections in them; name: for its progress bar."""
    dtype = jnp.dtype(dtype)
    kernel = attention.for_platform(meshes.platform(mesh), dtype)
    step = steps.make_predict_step(pretrained.model.clone(dtype=dtype, attention_kernel=kernel))
    predict = functools.partial(
        meshes.make_predictor(step, mesh), meshes.replicate(pretrained.params, mesh)
    )
    rows, threads = meshes.rows_of_process(batch_size, mesh), cluster.threads()

    def detect(batches: EvalBatches, name: str = '') -> dict:
        options = dict(desc=name, unit='batch', leave=not name, disable=not cluster.is_first())
        with progress_bar(total=len(batches), **options) as bar:
            options = dict(rows=rows, gather=cluster.gather, on_batch=bar.update, threads=threads)
            return evaluation.detect(predict, batches, **options)

    return detect


def evaluate(
    detector: str | Path | Detector | weights.Pretrained,
    data: str | Path | records.Records,
    split: str = 'val2017',
    *,
    batch_size: int | None = None,
    dtype: str = 'float32',
    log: Callable[[str], None] = print,
) -> dict:
    """COCO's twelve numbers of a detector on a split of a data set, and the AP of each class.

    detector: what `weights.read` takes or returns, or a `Detector`. data: what `records.read` takes (then
        with split) or returns. batch_size: images per step; None: one per device. dtype: of the
        activations. log: called with each note on the data.

    Returns:
        {'AP': ..., 'AP50': ..., ...} and, under 'classes', {name: AP}; -1 if there is no object.

    Raises:
        InputError: the detector or the data cannot be read, or have no class in common.
    """
    if dtype not in DTYPES:
        raise InputError(f'dtype is {dtype!r}, not {" or ".join(map(repr, DTYPES))}', 'dtype')
    pretrained = detector.pretrained if isinstance(detector, Detector) else detector
    if not isinstance(pretrained, weights.Pretrained):
        pretrained = weights.read(pretrained)
    data = data if isinstance(data, records.Records) else records.read(data, split)
    category_of, notes = class_matching.match(pretrained, data)
    for note in [*notes, *data.notes]:
        log(f'note: {note}')
    mesh = meshes.make_mesh()
    batch_size = batch_size_on(mesh, batch_size)
    detect = make_detect(pretrained, mesh, dtype=dtype, batch_size=batch_size)
    size = {'size': pretrained.size, 'max_size': pretrained.max_size}
    outputs = detect(EvalBatches(data, **size, batch_size=batch_size))
    results = evaluation.to_results(outputs, data, category_of)
    numbers, classes = evaluation.score(data.truth(), results)
    return numbers | {'classes': classes}


def corruptions_of(
    detect: Callable[..., dict],
    batches: Callable[..., EvalBatches],
    truth: annotations.Annotations,
    category_of: dict[int, int],
) -> dict[str, list[float]]:
    """The AP under each corruption at each strength; batches: makes those of images altered by `alter`."""
    result = {}
    for name in corruptions.CORRUPTIONS:
        values = []
        for strength in corruptions.STRENGTHS:
            alter = lambda image, number, n=name, s=strength: corruptions.corrupt(image, n, s, number)
            altered = batches(alter=alter)
            outputs = detect(altered, f'{name} {strength}')
            results = evaluation.to_results(outputs, altered.records, category_of)
            split = outcomes.columns(truth, results)
            values.append(precision.curves(outcomes.match(split)).ap())
        result[name] = values
    return result
