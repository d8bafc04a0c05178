"""Commands: python -m yolos_jax.tools.NAME."""
