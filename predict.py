"""Detect objects in images and videos: a script, as `yolos predict` is."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('predict')
