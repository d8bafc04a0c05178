"""Evaluate a detector: a script around `yolos_jax.tools.evaluate`, as `yolos eval` is."""

from yolos_jax.run import cli
from yolos_jax.tools.evaluate import main

if __name__ == '__main__':
    cli.run(main)
