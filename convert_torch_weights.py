"""Convert weights: a script around `yolos_jax.tools.convert`, as `yolos convert` is."""

from yolos_jax.run import cli
from yolos_jax.tools.convert import main

if __name__ == '__main__':
    cli.run(main)
