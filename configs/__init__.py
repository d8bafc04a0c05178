"""One file per recipe; installed as yolos_jax.configs."""
