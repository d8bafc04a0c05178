"""The data path: annotations -> records -> geometry -> plan -> loader; `pixels` processes single images."""

from yolos_jax import lazy

__getattr__ = lazy.modules_of(__name__)
