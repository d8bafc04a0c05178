"""A detector with everything needed to use it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from yolos_jax.errors import InputError
from yolos_jax.model import Yolos, param_shapes
from yolos_jax.naming import has_controls
from yolos_jax.patches import PATCH

UNBOUNDED = 100_000  # pixels: a longer side that no image reaches


def about_ids(category_ids: object) -> dict:
    """{'category_ids': {str(label): id}} for `Pretrained.about`, from a file that may say anything."""
    if not category_ids:
        return {}
    try:
        return {'category_ids': {str(int(label)): int(x) for label, x in category_ids.items()}}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f'category_ids are {str(category_ids)[:50]}, not numbers by labels') from None


def by_path(tree: dict) -> dict[str, Any]:
    """{path: array} of a tree."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A detector: its model, parameters, class names {id: name} and the size of image it was evaluated at.

    size, max_size: the shorter side images are resized to, and the bound of the longer, in pixels.
    about: its origin: 'source' and 'sha256' of a file; 'config', 'AP' and 'step' of a run, and
        'category_ids' {str(label): id}, where its data's ids are not the labels.
    """

    model: Yolos
    params: dict
    classes: dict
    size: int
    max_size: int
    about: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError if the number or the name of a class, or a size, cannot be used."""
        if wrong := [label for label in self.classes if not 0 <= label < self.model.num_classes]:
            raise InputError(
                f'a class has the number {wrong[0]}, and the model {self.model.num_classes} classes'
            )
        if unprintable := [name for name in self.classes.values() if has_controls(name)]:
            raise InputError(f'the name of a class has control characters: {unprintable[0][:50]!r}')
        for side in (self.size, self.max_size):
            if type(side) is not int or not PATCH <= side <= UNBOUNDED:
                raise InputError(
                    f'it is evaluated at {str(side)[:50]}, not at {PATCH} to {UNBOUNDED} pixels'
                )

    @property
    def category_ids(self) -> dict[int, int]:
        """{label: category id} of all labels of the class head."""
        ids = self.about.get('category_ids', {})
        return {label: int(ids.get(str(label), label)) for label in range(self.model.num_classes)}

    def check(self) -> None:
        """Raises InputError if the parameters are not the model's, or not finite; for writers."""
        arrays, expected = by_path(self.params), by_path(param_shapes(self.model))
        for name in sorted(arrays | expected):
            shape, wanted = (x[name].shape if name in x else None for x in (arrays, expected))
            if shape != wanted:
                raise InputError(f"parameters that are not the model's: {name} is {shape}, not {wanted}")
            if not np.isfinite(np.asarray(arrays[name])).all():
                raise InputError(f'values that are not finite, in {name}')
