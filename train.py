"""Train a detector: a script, as `yolos train` is."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('train')
