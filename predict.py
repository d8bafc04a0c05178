"""Detect objects in images and videos: a script around `yolos_jax.tools.predict`, as `yolos predict` is."""

from yolos_jax.run import cli
from yolos_jax.tools.predict import main

if __name__ == '__main__':
    cli.run(main)
