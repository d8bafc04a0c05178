"""The data path: annotations -> records -> geometry -> plan -> loader; per image pixels does the work."""

from yolos_jax import lazy

__getattr__ = lazy.modules_of(__name__)
