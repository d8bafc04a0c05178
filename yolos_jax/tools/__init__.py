"""Commands: `yolos NAME`, as `command` lists them, or python -m yolos_jax.tools.MODULE."""

from yolos_jax import lazy

__getattr__ = lazy.modules_of(__name__)
