"""Evaluate a detector: the same as `yolos eval`."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('evaluate')
