"""Commands: python -m yolos_jax.tools.NAME."""

from yolos_jax import lazy

__getattr__ = lazy.modules_of(__name__)
