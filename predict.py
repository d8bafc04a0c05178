"""Detect objects in images and videos: the same as `yolos predict`."""

from yolos_jax.run import cli

if __name__ == '__main__':
    cli.start('predict')
