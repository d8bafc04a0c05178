"""python -m yolos_jax NAME: the same commands as `yolos NAME`."""

from yolos_jax.tools import command

command.main()
