"""Evaluate a detector: a script, as `yolos eval` is."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('evaluate')
