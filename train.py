"""Train a detector: the same as `yolos train`."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('train')
