"""A tensor whose values are read or computed when they are needed."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read or computed when `numpy()` is called."""

    shape: tuple
    numpy: Callable

    def then(self, function: Callable[[np.ndarray], np.ndarray], shape: tuple | None = None) -> 'Tensor':
        """This tensor after a function of its array; shape: of the result, where it is another."""
        return Tensor(self.shape if shape is None else shape, lambda: function(self.numpy()))
