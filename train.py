"""Train a detector: a script around `yolos_jax.tools.train`, as `yolos train` is."""

from yolos_jax.run import cli
from yolos_jax.tools.train import main

if __name__ == '__main__':
    cli.run_with_flags(main)
