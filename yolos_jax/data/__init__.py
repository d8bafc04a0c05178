"""The data path: annotations -> records -> geometry -> plan -> loader; `pixels` processes single images."""

from typing import TYPE_CHECKING

from yolos_jax import lazy

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from yolos_jax.data import annotations as annotations
    from yolos_jax.data import batches as batches
    from yolos_jax.data import geometry as geometry
    from yolos_jax.data import loader as loader
    from yolos_jax.data import pixels as pixels
    from yolos_jax.data import records as records

__getattr__ = lazy.modules_of(__name__)
