"""Commands: `yolos NAME`, as `command` lists them, or python -m yolos_jax.tools.MODULE."""

from typing import TYPE_CHECKING

from yolos_jax import lazy

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from yolos_jax.tools import attention as attention
    from yolos_jax.tools import evaluate as evaluate
    from yolos_jax.tools import speed as speed
    from yolos_jax.tools import tokens as tokens

__getattr__ = lazy.modules_of(__name__)
