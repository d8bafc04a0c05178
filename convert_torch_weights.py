"""Convert weights: the same as `yolos convert`."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('convert')
