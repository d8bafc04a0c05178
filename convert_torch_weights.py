"""Convert weights: a script, as `yolos convert` is."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('convert')
