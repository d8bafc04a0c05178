"""Adapts a detector to another task: other classes, [DET] tokens or position tables.

Every function takes a `Pretrained` and returns the changed one with a line that reports the change. It
raises InputError if the model's sizes would be out of bounds.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from yolos_jax import posembed
from yolos_jax.errors import InputError, shown
from yolos_jax.model import Yolos
from yolos_jax.naming import name_key
from yolos_jax.weights import checkpoint, sizes
from yolos_jax.weights.pretrained import Pretrained

NEVER = -10  # the logit of a class that is never detected


def with_classes(
    pretrained: Pretrained, classes: dict[int, str], seed: int, seen: Collection[int] | None = None
) -> tuple[Pretrained, str]:
    """The detector with a class head for `classes` {id: name}.

    Rows of classes with the same name, and of "no object", are kept; others start as in the reference. The
    row of an unused number starts as never detected, since a random one would outscore the kept ones.
    seen: the classes that have objects, all when None. A class without any is unused if one of the same
    name has some, as in Roboflow's exports.
    """
    last = pretrained.params['class_embed']['layers_2']
    # of one name, a used class: the bias of an unused one is NEVER
    by_use = sorted(pretrained.classes.items(), key=lambda item: last['bias'][item[0]] > NEVER)
    old = {name_key(name): number for number, name in by_use}
    count = max(classes) + 1
    sizes.check(pretrained.model.clone(num_classes=count))
    bound = last['kernel'].shape[0] ** -0.5
    generator = np.random.default_rng(seed)
    fresh = lambda *shape: generator.uniform(-bound, bound, shape).astype(np.float32)
    kernel, bias = fresh(last['kernel'].shape[0], count + 1), fresh(count + 1)
    seen = {*classes} if seen is None else {*seen}
    keys = {number: name_key(name) for number, name in classes.items()}
    keys_seen = {keys[number] for number in classes if number in seen}
    namesakes = {number for number in classes if number not in seen and keys[number] in keys_seen}
    unused = sorted({*range(count)} - {*classes} | namesakes)
    kernel[:, unused], bias[unused] = 0, NEVER
    used = [number for number in classes if number not in namesakes]
    pairs = [(number, old[keys[number]]) for number in used if keys[number] in old]
    for new, known in [*pairs, (count, pretrained.model.num_classes)]:
        kernel[:, new], bias[new] = last['kernel'][:, known], last['bias'][known]
    head = pretrained.params['class_embed'] | {'layers_2': {'kernel': kernel, 'bias': bias}}
    changed = _changed(pretrained, {'num_classes': count}, {'class_embed': head}, classes=dict(classes))
    changed.about.pop('category_ids', None)  # they are of the old classes
    kept = shown(pretrained.classes[known] for _, known in pairs)
    return changed, (
        f'class head: {len(classes)} classes, {len(pairs)} of them kept'
        f'{f" ({kept})" if pairs else ""}, {len(used) - len(pairs)} fresh'
        f'{f", {len(namesakes)} unused: others have their names" if namesakes else ""}'
    )


def with_det_tokens(pretrained: Pretrained, count: int, seed: int) -> tuple[Pretrained, str]:
    """The detector with `count` [DET] tokens: the first are kept, others start as normal noise of 0.02."""
    old = pretrained.model.num_det_tokens
    sizes.check(pretrained.model.clone(num_det_tokens=count))
    generator = np.random.default_rng(seed)

    def resize(table: np.ndarray) -> np.ndarray:
        """The last `old` rows of the last axis but one are those of the tokens."""
        *lead, rows, D = table.shape
        fresh = generator.normal(0, 0.02, (*lead, max(count - old, 0), D)).astype(np.float32)
        return np.concatenate([table[..., : rows - old + min(count, old), :], fresh], axis=-2)

    backbone = pretrained.params['backbone']
    tables = {name: np.asarray(backbone[name]) for name in ('det_token', *_tables(pretrained.model))}
    backbone = backbone | {name: resize(table) for name, table in tables.items()}
    changed = _changed(pretrained, {'num_det_tokens': count}, {'backbone': backbone})
    return changed, f'[DET] tokens: {min(count, old)} of {old} kept, {max(count - old, 0)} fresh'


def with_pos_grid(pretrained: Pretrained, grid: tuple[int, int]) -> tuple[Pretrained, str]:
    """The detector with position tables of another size (rows, columns), resampled as torch's bicubic."""
    grid, tables = tuple(grid), _tables(pretrained.model)
    if not tables:
        raise InputError('its positions are rotary: there is no table to resample', 'new_pos_grid')
    fields = {name.replace('embed', 'grid'): grid for name in tables}
    sizes.check(pretrained.model.clone(**fields))
    backbone = pretrained.params['backbone']
    resampled = lambda name, old: posembed.with_grid(np.asarray(backbone[name]), old, grid)
    backbone = backbone | {name: resampled(name, old) for name, old in tables.items()}
    report = [f'{name} {old[0]}x{old[1]} -> {grid[0]}x{grid[1]}' for name, old in tables.items()]
    return _changed(pretrained, fields, {'backbone': backbone}), ', '.join(report)


def check_classes(
    pretrained: Pretrained, classes: dict[int, str], source: str | Path, argument: str | None = None
) -> None:
    """Raises InputError if `classes` {id: name} of `source` are not those of the detector.

    argument: the caller's argument that asks for a new class head, for the error.
    """
    known = {number: name_key(name) for number, name in pretrained.classes.items()}
    other = [f'{i} {name!r}' for i, name in classes.items() if known.get(i) != name_key(name)]
    if other:
        raise InputError(
            f'{source}: its classes are not those of the weights (the first: {", ".join(other[:3])}); they '
            'need a new class head',
            argument,
        )


def _tables(model: Yolos) -> dict[str, tuple[int, int]]:
    tables = {'pos_embed': model.pos_grid, 'mid_pos_embed': model.mid_pos_grid}
    return {name: grid for name, grid in tables.items() if grid is not None}


def _changed(pretrained: Pretrained, fields: dict, params: dict, **rest: Any) -> Pretrained:
    """The detector with some fields of its model and parameters changed: no run has measured it."""
    about = {key: value for key, value in pretrained.about.items() if key not in checkpoint.ABOUT_RUN}
    model, params = pretrained.model.clone(**fields), pretrained.params | params
    return dataclasses.replace(pretrained, model=model, params=params, about=about, **rest)
